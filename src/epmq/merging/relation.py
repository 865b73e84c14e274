"""Whether experts are what a merge takes them for: different fine-tunes of this base.

All of it is told from a sample of the weights and from small files, before any compute.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import BaseReader, ExpertReader
from epmq.models.blocks import block_linears
from epmq.models.heads import load_head

# Rows of each layer's weight that stand for all of it.
SAMPLE = 16
# Least correlation with the base of what was fine-tuned from it. Fine-tuning hardly turns a weight; those from another
# start have no correlation with it (a standard deviation of 0.01 for the ten thousand entries of a sample).
RELATED = 0.3
# Norm of the task vector over that of the base, above which an expert is noted: √2 is how far weights of another start
# are. An adapter that is scaled wrongly goes beyond it, as does a model whose weights were multiplied.
FAR = 1.4


def check_relation(experts: ExpertSet) -> list[str]:
    """Look for experts of another base, for experts that are the same, and for labels that differ.

    What is odd but may be meant is returned, in words that name the experts.

    Raises:
        ValueError: an expert was not fine-tuned from this base; expert and figures are named.
    """
    checks = (_check_weights, _check_adapters, _check_labels)
    return [note for check in checks for note in check(experts)]


def _check_weights(experts: ExpertSet) -> Iterator[str]:
    """Compare some rows of every layer, of one layer at a time; where all are equal, all weights."""
    cosines: dict[str, dict[str, float]] = {task: {} for task in experts.experts}
    sizes: dict[str, list[float]] = {task: [] for task in experts.experts}
    base_digest, digests = sha256(), {task: sha256() for task in experts.experts}
    linear, names = [f"{layer}.weight" for layer, _ in block_linears(experts.model)], set(experts.names)
    for name in [name for name in linear if name in names] or _matrices(experts):
        base = experts.base.tensor(name, slice(SAMPLE)).double()
        base_digest.update((base + 0.0).contiguous().numpy().data)  # -0 is 0
        for task, expert in experts.experts.items():
            rows = expert.tensor(name, slice(SAMPLE)).double()
            digests[task].update((rows + 0.0).contiguous().numpy().data)
            if not expert.has(name):  # the base's own
                continue
            change, size = float((rows - base).norm()), float(base.norm())
            cosines[task][name] = correlation(base, rows)
            sizes[task].append(change / size if size else float(change > 0))
    for task, expert in experts.experts.items():
        close, far = _median(cosines[task].values()), _median(sizes[task])
        if close < RELATED:
            name, least = min(cosines[task].items(), key=lambda item: item[1])
            raise InputError(
                f"expert {task}: its weights have a correlation of {close:.2f} with the base's, where fine-tuning "
                f"leaves one near 1: it was not fine-tuned from {experts.base.path} ({expert.path}; "
                f"the least is {least:.2f}, of {name!r})"
            )
        if far > FAR:
            yield f"expert {task} is far from the base: its task vector has {far:.1f} times the base's norm"
        if digests[task].digest() == base_digest.digest() and _same(experts, expert, experts.base):
            yield f"expert {task} is the base itself: it adds nothing to the merge"
    for one, other in combinations(digests, 2):
        alike = digests[one].digest() == digests[other].digest()
        if alike and _same(experts, experts.experts[one], experts.experts[other]):
            yield f"experts {one} and {other} have the same weights, which count twice in the merge"


def _matrices(experts: ExpertSet) -> list[str]:
    """All weights of more than one dimension, of a model without linear layers in blocks, such as convolutions."""
    base = experts.base
    return [name for name in experts.names if base.dtype(name) is not None and len(base.shape(name)) > 1]


def correlation(base: Tensor, expert: Tensor) -> float:
    """Cosine between the entries of two tensors of one shape; 1 where both are zero, 0 where one is."""
    size = float(base.norm() * expert.norm())
    return float((base * expert).sum()) / size if size else float(not base.any() and not expert.any())


def _median(figures: Iterable[float]) -> float:
    """Over layers, because a fine-tune may start some anew; what is NaN is refused later, by name."""
    return float(torch.tensor(list(figures)).nanmedian())


def _same(experts: ExpertSet, one: ExpertReader, other: ExpertReader | BaseReader) -> bool:
    """Whether two experts, or an expert and the base, are the same in every tensor."""
    return all(torch.equal(one.tensor(name), other.tensor(name)) for name in experts.names)


def _check_adapters(experts: ExpertSet) -> Iterator[str]:
    """Adapters say what they were trained on; that is a path or an id, so only its last part is compared."""
    sources = (experts.base.path, experts.source, str(experts.config.get("_name_or_path")))
    known = {Path(source).name for source in sources}
    for task, expert in experts.experts.items():
        trained_on = expert.adapter is not None and expert.adapter.config.get("base_model_name_or_path")
        if trained_on and Path(str(trained_on)).name not in known:
            yield f"expert {task}: the adapter was trained on {trained_on}; the base here is {experts.source}"


def _check_labels(experts: ExpertSet) -> Iterator[str]:
    """Heads that have the same classes in another order are two readings of one task."""
    labels = dict(_labels(experts))
    for one, other in combinations(labels, 2):
        ours, theirs = labels[one], labels[other]
        if ours != theirs and sorted(ours) == sorted(theirs):
            first = next(number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
            orders = "; ".join(f"{', '.join(names[first:]):.100}" for names in (ours, theirs))
            yield f"experts {one} and {other} have the same classes in another order, from number {first} on: {orders}"


def _labels(experts: ExpertSet) -> Iterator[tuple[str, list[str]]]:
    for task, expert in experts.experts.items():
        file, names = expert.head_file, (expert.head_config or {}).get("id2label")
        labels = list[str]()
        if file is not None and file.is_file():
            labels = load_head(file).labels
        elif isinstance(names, dict):
            labels = [str(names[number]) for number in sorted(names, key=_number)]
        if len(set(labels)) > 1:
            yield task, labels


def _number(key: object) -> tuple[int, str]:
    """Order of the keys of `id2label`, which are numbers in words: 10 comes after 9; what is no number, at the end."""
    text = str(key)
    return (int(text), text) if text.isdecimal() else (1 << 31, text)
