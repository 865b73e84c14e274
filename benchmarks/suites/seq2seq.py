"""seq2seq: a small T5 (version 1.1) trained from scratch, then on five text-to-text tasks, 64 tokens.

No pretrained T5 can be had from a package registry, so the base is made here: its tokenizer and its weights come
from the training texts of the suite alone. Sources, licences and sizes: `benchmarks/suites/LANGUAGE.md`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suites import language, text8
from benchmarks.suites.language import IGNORED, Batch, Prepared, Row
from epmq.demo.texts import TextTask, make_task, newswire, tidy
from epmq.files import write_json

NAME, KIND, MAX_LENGTH = "seq2seq", "seq2seq", 64
SETTINGS: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-4, "batch_size": 32}
QUICK_SETTINGS: dict[str, Any] = {"epochs": 1, "learning_rate": 5e-4, "batch_size": 32}
START_SETTINGS: dict[str, Any] = {"steps": 1200, "learning_rate": 1e-3, "batch_size": 32, "seed": 0}

VOCABULARY, SENTINELS = 6000, 32
CONFIG: dict[str, Any] = {
    "d_model": 256,
    "d_ff": 640,
    "d_kv": 64,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

# of the training rows of each task, this share is seen by the start: it learns the tasks' form, not their whole
SHARE = 0.2
# span corruption: tokens of a text, share that is hidden, tokens of a span
CORRUPTED, NOISE, SPAN = 40, 0.15, 3

# what a package is, is for or is written in; sections that say neither (misc, utils, devel …) are left out
_SECTIONS = (
    "admin cli-mono database doc editors electronics fonts games gnome gnu-r golang graphics haskell introspection "
    "java javascript kde libdevel libs lisp localization mail math net ocaml perl php python ruby rust science "
    "sound text video web x11"
)
SECTIONS = frozenset(_SECTIONS.split())


def _prompted(task: TextTask, prompt: str) -> Prepared:
    rows = [{"text": f"{prompt}: {text}", "target": task.classes[k]} for text, k in zip(task.texts, task.labels)]
    return Prepared(rows, task.source, task.groups)


def languages() -> Prepared:
    """Six words → the name of their language (24 in Latin script)."""
    return _prompted(text8.languages(), "name the language")


def sections() -> Prepared:
    """Name and one-line description of a Debian package → its section (36)."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=False)
    rows = list(read_packages(listed.stdout))
    if not rows:
        raise RuntimeError("apt has no package lists: run `apt-get update` once")
    source = text8.packages().source | {"note": "name and synopsis; group: the source package; 600 a section at most"}
    return _prompted(make_task(rows, source, cap=600), "section of package")


def read_packages(text: str) -> Iterator[tuple[str, str, str]]:
    """(`name, synopsis`, section, source package) of each stanza whose section is one of `SECTIONS`."""
    for stanza in text.split("\n\n"):
        values = dict(re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", stanza, re.M))
        section = values.get("Section", "").split("/")[-1]
        synopsis = values.get("Description") or values.get("Description-en") or ""
        if section in SECTIONS and synopsis:
            source = (values.get("Source") or values["Package"]).split()[0]
            yield f"{values['Package']}, {tidy(synopsis)}", section, source


def spam() -> Prepared:
    """Subject and beginning of an e-mail → spam or mail."""
    return _prompted(text8.spam(), "spam or mail")


def topics() -> Prepared:
    """A Reuters news item → its topic (8)."""
    return _prompted(newswire(), "topic of the news")


TASKS: dict[str, Callable[[], Prepared]] = {
    "languages": languages,
    "sections": sections,
    "spam": spam,
    "topics": topics,
}
_SMALLEST = {"train": 2400, "validation": 300, "test": 600}
SIZES = {
    "languages": _SMALLEST | {"train": 5000},
    "sections": _SMALLEST | {"train": 6000},
    "spam": _SMALLEST,
    "topics": _SMALLEST,
}


def prepare_base(folder: Path, root: Path, quick: bool) -> None:
    """Train tokenizer and weights of the common start: a third span corruption, the rest a first look at the tasks."""
    from transformers import T5Config, T5ForConditionalGeneration

    start = time.time()
    settings = START_SETTINGS | ({"steps": 20} if quick else {})
    by_task = [language.read_rows(root / "data" / task, "train") for task in TASKS]
    everything = [row for rows in by_task for row in rows]
    tokenizer = train_tokenizer(everything)
    torch.manual_seed(settings["seed"])
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **CONFIG))
    # the library's scale of 1 suits long training: at a short one the embeddings would hardly move
    for matrix in (model.shared.weight, model.lm_head.weight):
        torch.nn.init.normal_(matrix, std=CONFIG["d_model"] ** -0.5)
    seen = [rows[: int(SHARE * len(rows))] for rows in by_task]
    language.train(
        model,
        lambda rng: start_batches(tokenizer, everything, seen, settings["steps"], settings["batch_size"], rng),
        epochs=1,
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        progress=language.Log("base"),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"settings": settings | {"share": SHARE}, "seconds": round(time.time() - start, 1)}
    write_json(folder / "training.json", record)


def train_tokenizer(rows: Sequence[Row]) -> Any:
    """A unigram tokenizer that ends a text with `</s>`, with sentinels `<extra_id_0>` … as T5's has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.decoders import Metaspace
    from transformers import PreTrainedTokenizerFast

    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>", *sentinels],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((row[name] for row in rows for name in ("text", "target")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
    )


def start_batches(
    tokenizer: Any,
    texts: Sequence[Row],
    by_task: Sequence[Sequence[Row]],
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[Batch]:
    """Batches of the start: corrupted texts, then twice a task's prompts with answers, the task drawn evenly."""
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for step in range(steps):
        # one task a batch: texts of two tasks differ in length, and padding costs as much as words
        source = texts if step % 3 == 0 else by_task[int(rng.integers(len(by_task)))]
        rows = [source[i] for i in rng.integers(len(source), size=batch_size)]
        if source is texts:
            ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=CORRUPTED)["input_ids"]
            yield padded([corrupt(row, first, tokenizer.eos_token_id, rng) for row in ids], tokenizer.pad_token_id)
        else:
            yield language.make_batch(tokenizer, rows, KIND, MAX_LENGTH)


def corrupt(ids: Sequence[int], first: int, end: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """T5's span corruption: (text with a sentinel for each hidden span, the sentinels with what they hide).

    Args:
        ids: tokens of a text, `end` last.
        first: id of the first sentinel; the others follow it.
        end: id of the end token.
        rng: draws the spans, of three tokens each unless two meet.
    """
    body = list(ids[:-1])
    hidden = np.zeros(len(body), dtype=bool)
    for start in rng.integers(max(1, len(body) - SPAN + 1), size=max(1, round(NOISE * len(body) / SPAN))):
        hidden[start : start + SPAN] = True
    text: list[int] = []
    target: list[int] = []
    sentinel = first
    for i, token in enumerate(body):
        if not hidden[i]:
            text.append(token)
            continue
        if i == 0 or not hidden[i - 1]:
            text.append(sentinel)
            target.append(sentinel)
            sentinel += 1
        target.append(token)
    return [*text, end], [*target, end]


def padded(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Pairs of inputs and targets as one batch."""
    tensor = torch.nn.utils.rnn.pad_sequence
    texts, targets = ([torch.tensor(pair[side]) for pair in pairs] for side in (0, 1))
    return {
        "input_ids": tensor(texts, batch_first=True, padding_value=pad),
        "attention_mask": tensor([torch.ones_like(text) for text in texts], batch_first=True),
        "labels": tensor(targets, batch_first=True, padding_value=IGNORED),
    }


def build(tasks: Sequence[str] | None = None, quick: bool = False) -> Path:
    """Build the suite, or the named experts of it (see `language.build`)."""
    return language.build(sys.modules[__name__], tasks, quick)
