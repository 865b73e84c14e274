"""Tokenizers as GGUF files hold them, made of the one form that all fast tokenizers have: `tokenizer.json`."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epmq.data.processors import tokenizer_of
from epmq.errors import InputError
from epmq.files import read_json

# What llama.cpp calls the ways of splitting a text before byte pairs are merged, by the patterns that split it.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_MARKED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES, DIGITS = "bytes", "digits"  # as GPT-2 splits, and every digit for itself
SPLITS: dict[tuple[str, ...], str] = {
    (BYTES,): "gpt-2",
    (DIGITS, BYTES): "smollm",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}{_REST}",): "llama-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{_REST}",): "qwen2",
    (_MARKED % ("", "") + r"|\p{N}" + _MARKED_REST,): "tekken",
    (_MARKED % (f"{_ENDINGS}?", f"{_ENDINGS}?") + r"|\p{N}{1,3}" + _MARKED_REST,): "gpt-4o",
}
# Other ways of writing the same pattern.
SAME = {"'(?i:[sdmt]|ll|ve|re)": _ENDINGS, "?+": "?", "++": "+"}
# Llama 3 takes words that are tokens as they are; others split as it does, and always merge.
MERGING = {"llama-bpe": "dbrx"}
# What llama.cpp takes for the space in front of a word, and kinds of tokens as ggml numbers them.
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """A tokenizer as the file holds it.

    Attributes:
        model: how texts are cut: gpt2 (byte pairs), llama (byte pairs of sentencepiece), t5 (unigrams), bert, none.
        tokens: by id.
        kinds: of the tokens, as ggml numbers them.
        scores: of llama's and t5's tokens.
        merges: of gpt2's.
        settings: the others, by their names behind `tokenizer.`.
    """

    model: str = "none"
    tokens: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def vocabulary(processor: Any, rows: int) -> Vocabulary:
    """The tokenizer of a processor with as many tokens as the model has rows; without one there are only ids.

    Raises:
        InputError: llama.cpp has none that cuts texts alike; what it lacks is said.
    """
    tokenizer = tokenizer_of(processor) if processor is not None else None
    if tokenizer is None:
        return Vocabulary()
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"gguf cannot hold a {type(tokenizer).__name__}: it has no tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    made = _cut(content)
    _add_tokens(made, content, rows)
    made.settings |= _special(tokenizer, made.model)
    return made


def _cut(content: Mapping[str, Any]) -> Vocabulary:
    """How texts are cut into pieces, and what the pieces score; without tokens."""
    model, steps = content["model"], list(_steps(content["pre_tokenizer"]))
    kind = model["type"]
    if kind == "WordPiece":
        return _word_pieces(content)
    if kind == "Unigram":
        return _unigrams(content)
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        name = _pre(steps)
        name = name if model.get("ignore_merges") else MERGING.get(name, name)
        return Vocabulary("gpt2", merges=merges, settings={"ggml.pre": name})
    if kind == "BPE" and model.get("byte_fallback"):
        return _pieces(content)
    raise InputError(f"gguf cannot hold a tokenizer of type {kind}: llama.cpp has none like it")


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, one after the other."""
    for inner in (part or {}).get("normalizers") or (part or {}).get("pretokenizers") or []:
        yield from _steps(inner)
    if part is not None and part["type"] != "Sequence":
        yield part


def _pre(steps: list[Mapping[str, Any]]) -> str:
    """What llama.cpp calls the way in which a text is split before byte pairs are merged."""
    found: list[str] = []
    for step in steps:
        if step["type"] == "Split":
            pattern = next(iter(step["pattern"].values()))
            for other, same in SAME.items():
                pattern = pattern.replace(other, same)
            found.append(pattern)
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(DIGITS)
        elif step["type"] == "ByteLevel":
            found += [BYTES] if step["use_regex"] else []
        else:
            found.append(step["type"])
    if tuple(found) not in SPLITS or any(step.get("add_prefix_space") for step in steps):
        raise InputError(
            f"gguf cannot hold this tokenizer: llama.cpp splits no text as it does ({', '.join(found)}); "
            f"known are those of {', '.join(SPLITS.values())}"
        )
    return SPLITS[tuple(found)]


def _pieces(content: Mapping[str, Any]) -> Vocabulary:
    """Byte pairs of sentencepiece: what is merged first has the highest score."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(content["model"]["merges"]):
        merged = "".join(pair.split(" ") if isinstance(pair, str) else pair)
        scores.setdefault(merged, -float(rank))
    least = -float(len(content["model"]["merges"]))
    ordered = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    settings = {"ggml.add_space_prefix": _adds_space(content), "ggml.pre": "default"}
    return Vocabulary("llama", scores=[scores.get(token, least) for token, _ in ordered], settings=settings)


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    normal, split = list(_steps(content["normalizer"])), list(_steps(content["pre_tokenizer"]))
    return any(step["type"] == "Prepend" for step in normal) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in split
    )


def _unigrams(content: Mapping[str, Any]) -> Vocabulary:
    """Pieces with scores, of which the likeliest sequence is taken."""
    split = [step["type"] for step in _steps(content["pre_tokenizer"])]
    normal = list(_steps(content["normalizer"]))
    others = {*split, *(step["type"] for step in normal)} - {
        "Metaspace", "WhitespaceSplit", "Precompiled", "Strip", "Replace", "Prepend"
    }  # fmt: skip
    if others:
        raise InputError(f"gguf cannot hold this tokenizer: llama.cpp's t5 knows no {', '.join(sorted(others))}")
    settings: dict[str, Any] = {"ggml.add_space_prefix": _adds_space(content), "ggml.pre": "default"}
    settings["ggml.remove_extra_whitespaces"] = "WhitespaceSplit" in split or any(
        step["type"] == "Replace" for step in normal
    )
    for step in normal:
        if step["type"] == "Precompiled":
            settings["ggml.precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
    return Vocabulary("t5", scores=[float(score) for _, score in content["model"]["vocab"]], settings=settings)


def _word_pieces(content: Mapping[str, Any]) -> Vocabulary:
    normal = next((step for step in _steps(content["normalizer"]) if step["type"] == "BertNormalizer"), None)
    if normal is None or content["model"]["continuing_subword_prefix"] != "##":
        raise InputError("gguf cannot hold this tokenizer: llama.cpp cuts word pieces as BERT does")
    accents = normal["lowercase"] if normal["strip_accents"] is None else normal["strip_accents"]
    lower = {"ggml.normalizer.lowercase": normal["lowercase"], "ggml.normalizer.strip_accents": accents}
    return Vocabulary("bert", settings={**lower, "ggml.pre": "default"})


def _add_tokens(made: Vocabulary, content: Mapping[str, Any], rows: int) -> None:
    """Add the tokens and their kinds, as many as the model has rows."""
    pieces = content["model"]["vocab"]
    ids = {i: piece for i, (piece, _) in enumerate(pieces)} if isinstance(pieces, list) else {}
    ids = ids or {i: piece for piece, i in pieces.items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    unknown, scored = content["model"].get("unk_id"), bool(made.scores)
    by_id = dict(zip(sorted(ids), made.scores))
    made.scores = []
    for i in range(rows):
        text, kind = ids.get(i, f"[PAD{i}]"), NORMAL if i in ids else UNUSED
        if made.model == "bert":
            text = text.removeprefix("##") if text.startswith("##") else SPACE + text if i in ids else text
        elif scored and (i == unknown or text == content["model"].get("unk_token")):
            kind = UNKNOWN
        elif made.model == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = BYTE
        if i in added:
            text = added[i]["content"]
            kind = kind if kind == UNKNOWN else CONTROL if added[i]["special"] else ADDED
            text = text.replace(SPACE, " ") if kind == ADDED else text
        made.tokens.append(text)
        made.kinds.append(kind)
        made.scores += [by_id.get(i, 0.0)] if scored else []


def _special(tokenizer: Any, model: str) -> dict[str, Any]:
    """Special tokens, and which of them are written around a text, found by encoding one."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad", "mask": "mask"}
    names |= {"bos": "cls"} if model == "bert" else {}
    found: dict[str, Any] = {}
    for name, short in names.items():
        token = getattr(tokenizer, f"{short}_token_id", None)
        found |= {} if token is None else {f"ggml.{name}_token_id": token}
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    first, last = whole[:start], whole[start + len(text) :]
    if len(first) > 1 or len(last) > 1:
        raise InputError("gguf cannot hold this tokenizer: it writes several tokens in front of or behind a text")
    found |= {"ggml.bos_token_id": first[0]} if first else {}
    found["ggml.add_bos_token"] = bool(first)
    ending = "seperator" if model == "bert" else "eos"
    if last and found.setdefault(f"ggml.{ending}_token_id", last[0]) != last[0]:
        found |= {f"ggml.{ending}_token_id": last[0], "ggml.eot_token_id": found[f"ggml.{ending}_token_id"]}
    found["ggml.add_sep_token" if model == "bert" else "ggml.add_eos_token"] = bool(last)
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    return found | ({"chat_template": template} if template else {})


def other_end(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The second token that ends an answer, as `generation_config.json` names it."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.exists() else None
    others = [end for end in ends if end != settings.get("ggml.eos_token_id")] if isinstance(ends, list) else []
    return {"ggml.eot_token_id": others[0]} if others else {}
