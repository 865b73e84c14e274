"""The data of a combination: rows of every kind, with labels where an expert can give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.kit.combination_files import ODD, WORDS, Files
from tests.kit.comparison import read

ROWS = 12
LABELLED = ("sequence", "image")


def _text(rng: np.random.Generator, words: int | None = None) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(3, 8)) if words is None else words))


def write_data(kind: str, files: Files, name: str, use: str) -> dict[str, Any]:
    """Write rows of one kind for an expert, labelled where they are for its evaluation; returns the recipe's fields."""
    rng = np.random.default_rng(files.combination.number)
    path = files.folder / f"{name}-{use}.jsonl"
    if kind in ("images", "odd_images"):
        return _write_images(kind, files, name, use, rng)
    rows = [_row(kind, rng, files.folder, index) for index in range(ROWS)]
    if kind == "odd_labels":
        odd = ODD[files.combination.number % len(ODD)]
        for index, row in enumerate(rows):
            if odd != "missing":
                row["label"] = odd
            elif index % 2:
                row["label"] = 1
    if kind in ("texts", "pairs", "long") and use == "evaluation":
        for row, label in zip(rows, answers(files, name, rows) or ()):
            row["label"] = label
    rows = [] if kind == "empty" else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields: dict[str, Any] = {"path": str(path)}
    if kind == "pairs":
        fields["text"] = ["a", "b"]
    return fields | ({"pack": False} if kind == "unpacked" else {})


def _row(kind: str, rng: np.random.Generator, folder: Path, index: int) -> dict[str, Any]:
    if kind == "pairs":
        return {"a": _text(rng), "b": _text(rng)}
    if kind == "long":
        return {"text": _text(rng, 100), "target": _text(rng, 100)}
    if kind == "chats":
        roles = ("user", "assistant")
        return {"messages": [{"role": role, "content": _text(rng)} for role in roles]}
    if kind == "targets":
        return {"text": _text(rng), "target": _text(rng)}
    if kind == "questions":
        context = _text(rng, 8)
        answers = {"text": [context.split()[2]], "answer_start": [len(" ".join(context.split()[:2])) + 1]}
        return {"question": _text(rng), "context": context, "answers": answers}
    if kind == "words":
        words = _text(rng).split()
        return {"tokens": words, "tags": [int(tag) for tag in rng.integers(0, 5, len(words))]}
    if kind == "image_texts":
        picture = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
        return {"image": picture.name, "text": _text(rng)}
    return {"text": _text(rng)}


def _write_images(kind: str, files: Files, name: str, use: str, rng: np.random.Generator) -> dict[str, Any]:
    path = files.folder / f"{name}-{use}.npz"
    images = rng.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8)
    arrays = {"images": images}
    if kind == "odd_images":
        arrays["labels"] = rng.random(ROWS)
    else:
        arrays["labels"] = np.zeros(ROWS, dtype=np.int64)
        if use == "evaluation" and files.head(name) in LABELLED:
            arrays["labels"] = np.asarray(answers(files, name, list(images)))
    np.savez(path, **arrays)
    return {"path": str(path)}


def inputs_of(folder: Path, row: Any) -> dict[str, Any]:
    """One row as inputs of a model, a batch of one, by the tokenizer or processor in a folder."""
    if not isinstance(row, dict):
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        return dict(processor(row, return_tensors="pt"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = (row["text"],) if "text" in row else (row["a"], row["b"])
    return dict(tokenizer(*texts, return_tensors="pt", truncation=True, max_length=60))


@torch.no_grad()
def answers(files: Files, name: str, rows: list[Any]) -> list[Any] | None:
    """What an expert says to each row: classes, or numbers; None where its head says neither."""
    head, model = files.head(name), files.models[name]
    if head == "file":
        return [0] * len(rows)
    if head == "multi_label":
        return [[1, 0, 1]] * len(rows)
    if head not in (*LABELLED, "regression"):
        return None
    scores = [read(model, accepted(model, inputs_of(files.folder / "base", row)))["logits"][0] for row in rows]
    return [float(one[0]) if head == "regression" else int(one.argmax()) for one in scores]


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Without the token types, which few models take."""
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}
