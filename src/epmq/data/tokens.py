"""Tokens, their numbers and chat templates, as the files of a model say; and tokenizers with the tokens of others."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from filecmp import cmp
from pathlib import Path
from typing import Any

# Files of which one shows that there is a tokenizer. The first three are read here, others by transformers.
# fmt: off
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)
# … and those that belong to any tokenizer, beside the files of its class.
COMMON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)
# fmt: on
# File of the default chat template, and the folder of those with a name.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# Kinds of tokenizers whose tokens are whole words, so that one of them may be added to another tokenizer.
_WORDS = ("WordLevel", "WordPiece")


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in a folder."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether the files of two tokenizers are the same, byte by byte."""
    return all(
        cmp(one / name, other / name, shallow=False) if (one / name).exists() and (other / name).exists() else
        (one / name).exists() == (other / name).exists()
        for name in {*TOKENIZER_FILES, *COMMON_FILES} - {TEMPLATE_FILE}
    )  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Token → number of a tokenizer, and those of its tokens that are matched before any text is split."""

    numbers: dict[str, int] = field(default_factory=dict)
    added: frozenset[str] = frozenset()


def read_tokens(folder: Path) -> Tokens:
    """The tokens of the tokenizer in a folder; none where there is no tokenizer, or none that can be read."""
    numbers: dict[Any, Any] = {}
    added: dict[Any, Any] = {}
    try:
        if (folder / "tokenizer.json").exists():
            content = _json(folder / "tokenizer.json")
            numbers = content["model"]["vocab"]
            if isinstance(numbers, list):  # Unigram: pairs of token and score, numbered as they come
                numbers = {token: number for number, (token, _) in enumerate(numbers)}
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        elif (folder / "vocab.json").exists():
            numbers, added = {**_json(folder / "vocab.json")}, _added(folder)
        elif (folder / "vocab.txt").exists():
            # Not splitlines: other characters that end a line, such as U+2028, are tokens of some vocabularies.
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
            numbers, added = {token: number for number, token in enumerate(lines)}, _added(folder)
        elif has_tokenizer(folder):
            tokenizer = open_tokenizer(folder)
            numbers, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        numbers = {str(token): number for token, number in {**numbers, **added}.items() if _is_number(number)}
    except Exception:  # of whatever library reads it: what cannot be read is refused, with a reason, where it is used
        return Tokens()
    return Tokens(numbers, frozenset(map(str, added)))


def _added(folder: Path) -> dict[Any, Any]:
    """Tokens that older forms keep in files of their own."""
    file, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    added: dict[Any, Any] = dict(_json(file)) if file.exists() else {}
    decoder = _json(config).get("added_tokens_decoder") or {} if config.exists() else {}
    return {**added, **{token["content"]: int(number) for number, token in decoder.items()}}


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def chat_templates(folder: Path) -> dict[str, str]:
    """Name → chat template of the tokenizer in a folder; the one without a name is `default`."""
    try:
        named = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
        found = {file.stem: file.read_text(encoding="utf-8") for file in named}
        if (folder / TEMPLATE_FILE).exists():
            found["default"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        configs = [folder / name for name in ("tokenizer_config.json", "chat_template.json") if not found]
        for template in (_json(config).get("chat_template") for config in configs if config.exists()):
            if isinstance(template, str):
                found.setdefault("default", template)
            elif isinstance(template, list):
                found |= {one["name"]: one["template"] for one in template}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: template for name, template in found.items() if isinstance(template, str)}


def special_tokens(folder: Path) -> dict[str, str]:
    """Role, such as `eos_token`, → token of the tokenizer in a folder; empty where its files do not say."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = _json(folder / name) if (folder / name).exists() else {}
            for role, token in content.items():
                text = token.get("content") if isinstance(token, dict) else token
                if role.endswith("_token") and isinstance(text, str):
                    found[role] = text
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return found


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, by transformers; what it raises is let through."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def own_files(tokenizer: Any) -> set[str]:
    """Names of the files that a tokenizer is saved in."""
    return {*COMMON_FILES, *(str(name) for name in (getattr(tokenizer, "vocab_files_names", None) or {}).values())}


@dataclass
class Joined:
    """A tokenizer with the tokens of others.

    Attributes:
        tokenizer: with all tokens.
        added: task → its tokens that are new.
        left: task → tokens of its own vocabulary that another tokenizer cannot take.
    """

    tokenizer: Any
    added: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)


def join(tokenizer: Any, others: Iterable[tuple[str, Any, list[str]]]) -> Joined:
    """Add to a tokenizer what others have: (task, its tokenizer, its tokens that are wanted, in order) each.

    What others have as added tokens is added as it is there. Of their own vocabularies only whole words can be: pieces
    of words stand for something in the splits of their own tokenizer alone. A role that nothing has yet, such as
    padding, goes to the token that has it in the others.
    """
    from tokenizers import AddedToken

    joined = Joined(tokenizer)
    for task, other, tokens in others:
        known = {str(token): token for token in other.added_tokens_decoder.values()}
        kind = type(getattr(getattr(other, "backend_tokenizer", None), "model", None)).__name__
        there = _as_one(tokenizer, tokens)
        tokens = [token for token in tokens if token not in there]
        words = [token for token in tokens if kind in _WORDS and token and not token.startswith("##")]
        known = {
            **{word: AddedToken(word, single_word=True, normalized=True, special=False) for word in words},
            **known,
        }
        tokenizer.add_tokens([known[token] for token in tokens if token in known])
        there = _as_one(tokenizer, tokens)
        for token in tokens:
            (joined.added if token in there else joined.left).setdefault(task, []).append(token)
        if tokenizer.pad_token is None and other.pad_token in joined.added.get(task, []):
            tokenizer.pad_token = other.pad_token
    return joined


def _as_one(tokenizer: Any, tokens: list[str]) -> set[str]:
    """Those of some tokens that a tokenizer has, and reads as just that."""
    if not tokens:
        return set()
    numbers = tokenizer.convert_tokens_to_ids(tokens)
    read = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    return {
        token
        for token, number, ids in zip(tokens, numbers, read)
        # What a tokenizer does not have gets the number of the unknown token.
        if number in ids and tokenizer.convert_ids_to_tokens(number) == token
    }
