"""Whether experts are what a merge takes them for: different fine-tunes of this base.

All of it is told from a sample of the weights and from small files, before any compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq.adapters import Adapter
from epmq.blocks import block_linears
from epmq.heads import HEAD_FILE, load_head
from epmq.sources import Sources

# Rows of each layer's weight that stand for all of it.
SAMPLE = 16
# Least correlation with the base of what was fine-tuned from it. Fine-tuning hardly turns a weight; those from another
# start have no correlation with it (a standard deviation of 0.01 for the ten thousand entries of a sample).
RELATED = 0.3
# Share of the tokens that two tokenizers number alike, above which they are one with a few additions.
SAME_TOKENS = 0.99


def check_lineage(sources: Sources) -> list[str]:
    """Look for experts of another base, for experts that are the same, and for tokenizers and labels that differ.

    Returns:
        what is odd but may be meant, in words that name the experts.

    Raises:
        ValueError: an expert was not fine-tuned from this base, or its tokens have other numbers, or the tokenizer has
            more tokens than the model; expert and figures are named.
    """
    notes = _check_weights(sources)
    notes += _check_adapters(sources)
    notes += _check_tokenizers(sources)
    return notes + _check_labels(sources)


def _check_weights(sources: Sources) -> list[str]:
    base, notes = _sample(sources, None), []
    samples = {task: _sample(sources, task) for task in sources.experts}
    for task, sample in samples.items():
        close = correlation(base, sample)
        if close < RELATED:
            raise ValueError(
                f"expert {task}: its weights have a correlation of {close:.2f} with the base's, where fine-tuning "
                f"leaves one near 1: it was not fine-tuned from {sources.base.path} ({sources.experts[task].path})"
            )
        if _equal(base, sample) and _same(sources, task, None):
            notes.append(f"expert {task} is the base itself: it adds nothing to the merge")
    for one, other in combinations(samples, 2):
        if _equal(samples[one], samples[other]) and _same(sources, one, other):
            notes.append(f"experts {one} and {other} have the same weights, which count twice in the merge")
    return notes


def _sample(sources: Sources, task: str | None) -> list[Tensor]:
    """Some rows of every layer's weight, of an expert or of the base if `task` is None, float32."""
    rows, names = slice(0, SAMPLE), [f"{name}.weight" for name, _ in block_linears(sources.model)]
    read = sources.base_rows if task is None else lambda name, rows: sources.expert_rows(task, name, rows)
    return [read(name, rows).float() for name in names if name in sources.names]


def correlation(base: list[Tensor], expert: list[Tensor]) -> float:
    """Median over layers of the cosine between the weights of two models; 1 where a layer is zero in both.

    The median, because a fine-tune may start some layers anew.
    """
    found = []
    for ours, theirs in zip(base, expert):
        size = float(ours.norm() * theirs.norm())
        found.append(float((ours * theirs).sum()) / size if size else float(not ours.any() and not theirs.any()))
    return float(torch.tensor(found).median()) if found else 1.0


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def _same(sources: Sources, task: str, other: str | None) -> bool:
    """Whether two experts, or an expert and the base, are the same in every tensor."""

    def read(name: str) -> Tensor:
        return sources.base_tensor(name) if other is None else sources.expert_tensor(other, name)

    return all(torch.equal(sources.expert_tensor(task, name), read(name)) for name in sources.names)


def _check_adapters(sources: Sources) -> list[str]:
    """Adapters say what they were trained on; that is a path or an id, so only its last part is compared."""
    notes = []
    known = {
        sources.base.path.name,
        Path(sources.recipe.base).name,
        Path(str(sources.config.get("_name_or_path"))).name,
    }
    for task, expert in sources.experts.items():
        trained_on = isinstance(expert, Adapter) and expert.config.get("base_model_name_or_path")
        if trained_on and Path(str(trained_on)).name not in known:
            notes.append(
                f"expert {task}: the adapter was trained on {trained_on}; the base here is {sources.recipe.base}"
            )
    return notes


def _check_tokenizers(sources: Sources) -> list[str]:
    ours, notes = token_numbers(sources.base.path), []
    if not ours:
        return []
    try:
        rows = sources.model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a model of several parts, or of images
        rows = None
    if rows is not None and max(ours.values()) >= rows:
        raise ValueError(
            f"{sources.base.path}: the tokenizer has token number {max(ours.values())}, but the embeddings {rows} rows"
        )
    for task, expert in sources.experts.items():
        theirs = token_numbers(expert.path)
        shared = ours.keys() & theirs.keys()
        if not theirs:
            continue
        moved = [token for token in sorted(shared) if ours[token] != theirs[token]]
        alike = (len(shared) - len(moved)) / max(1, min(len(ours), len(theirs)))
        if alike < SAME_TOKENS:
            example = f", such as {moved[0]!r}" if moved else ""
            raise ValueError(
                f"expert {task}: its tokenizer numbers only {100 * alike:.0f} % of the tokens as the base's does"
                f"{example} ({expert.path})"
            )
        if moved:
            notes.append(
                f"expert {task}: {len(moved)} tokens have other numbers than in the base, such as {moved[0]!r}"
            )
    return notes


def token_numbers(folder: Path) -> dict[str, int]:
    """Token → number of the tokenizer in a folder; empty where there is none, or none of a known form."""
    try:
        if (folder / "tokenizer.json").exists():
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: pairs of token and score, numbered as they come
                vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            found: dict[Any, Any] = {**vocabulary, **added}
        elif (folder / "vocab.txt").exists():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            found = {token: number for number, token in enumerate(lines)}
        else:
            return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # what cannot be read is refused, with a reason, where it is used
    return {str(token): number for token, number in found.items() if type(number) is int}


def _check_labels(sources: Sources) -> list[str]:
    """Heads that have the same classes in another order are two readings of one task."""
    notes = []
    labels = dict(_labels(sources))
    for one, other in combinations(labels, 2):
        ours, theirs = labels[one], labels[other]
        if ours != theirs and sorted(ours) == sorted(theirs):
            orders = f"{', '.join(ours)}; {', '.join(theirs)}"
            notes.append(f"experts {one} and {other} have the same classes in another order: {orders}")
    return notes


def _labels(sources: Sources) -> Iterator[tuple[str, list[str]]]:
    for expert in sources.recipe.experts:
        file = Path(expert.head) if expert.head else sources.experts[expert.name].path / HEAD_FILE
        names = (sources.head_config(expert.name) or {}).get("id2label")
        if file.is_file():
            found = load_head(file).labels
        elif isinstance(names, dict):
            found = [str(names[number]) for number in sorted(names, key=str)]
        else:
            continue
        if len(set(found)) > 1:
            yield expert.name, found
