"""Rows of tables of tokens, looked up by token: models may number their tokens otherwise, or have more of them.

A table is a tensor with a row a token: embeddings, the output layer, its bias. Every model has its own numbers, "its
own rows"; the merged model has the output's. A reader with `TokenRows` gives a table as the merged model has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Stretches of consecutive rows that are read one by one; where there are more, all that lies between is read.
STRETCHES = 256
# Ends of the names of fields of a config that hold numbers of tokens.
TOKEN_FIELDS = ("_token_id", "_token_ids", "_token_index")
# Reads a tensor with a model's own rows, or some of them, along its first dimension.
ReadOwn = Callable[[str, slice | None], Tensor]
# Gives the rows at some positions of the merged model, where a model has none of its own.
Fill = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class TokenRows:
    """Where each row of the merged model's tables lies among one model's own.

    Attributes:
        tables: name of a table → the dimension that counts tokens.
        index: number in the merged model → in this one, int64 [tokens]; -1 for a token that it does not have.
        sizes: name of a table → how many rows the model has of its own.
        read: reads the model's own rows.
        fill: gives the rows that it does not have.
    """

    tables: Mapping[str, int]
    index: Tensor
    sizes: Mapping[str, int]
    read: ReadOwn
    fill: Fill

    def own(self, name: str) -> Tensor:
        """The index of one table."""
        return self.index.where(self.index < self.sizes[name], -1)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor in the merged model, whose shape is `shape` in this one."""
        dimension = self.tables.get(name, -1)
        return tuple(len(self.index) if i == dimension else size for i, size in enumerate(shape))

    def lacking(self, name: str, rows: slice | None = None) -> Tensor:
        """Which entries of a table, or of some rows of it, are of tokens that the model does not have: a mask."""
        dimension, mask = self.tables[name], self.own(name) < 0
        if rows is not None and dimension == 0:
            mask = mask[rows]
        return mask.view(-1, 1) if dimension == 0 else mask

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A table as the merged model has it, or some rows of it, along its first dimension."""
        positions = torch.arange(len(self.index))
        if self.tables[name] == 0:
            return self.at(name, positions if rows is None else positions[rows])
        whole = self.at(name, positions)
        return whole if rows is None else whole[rows]

    def of_head(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a task's head, in which those that score tokens have a row for each of the merged model's.

        That is told from their size: a head for another task with just as many classes is not to be thought of.
        """
        size, merged = max(self.sizes.values()), dict[str, Tensor]()
        for name, tensor in tensors.items():
            if tensor.ndim and len(tensor) == size:
                rows = tensor.new_zeros(len(self.index), *tensor.shape[1:])
                there = (self.index >= 0) & (self.index < size)
                rows[there] = tensor[self.index[there]]
                tensor = rows
            merged[name] = tensor
        return merged

    def at(self, name: str, positions: Tensor) -> Tensor:
        """The rows at some positions of the merged model: [.., positions, ..], along the dimension of tokens."""
        dimension, own = self.tables[name], self.own(name)[positions]
        there = own >= 0
        if there.all():
            return self.some(name, own)
        filled = self.fill(name, positions[~there])
        if not there.any():
            return filled
        found = self.some(name, own[there])
        dtype = torch.promote_types(found.dtype, filled.dtype)
        shape = [len(positions) if i == dimension else size for i, size in enumerate(found.shape)]
        rows = torch.empty(shape, dtype=dtype)
        rows.index_copy_(dimension, there.nonzero()[:, 0], found.to(dtype))
        return rows.index_copy_(dimension, (~there).nonzero()[:, 0], filled.to(dtype))

    def some(self, name: str, numbers: Tensor) -> Tensor:
        """The model's own rows of these numbers."""
        return read_rows(self.read, name, numbers, self.tables[name])


def read_rows(read: ReadOwn, name: str, numbers: Tensor, dimension: int = 0) -> Tensor:
    """Rows of a table by their numbers, of which there is at least one, along the dimension of tokens."""
    if dimension:
        return read(name, None).index_select(dimension, numbers)
    starts = [0, *(1 + (numbers.diff() != 1).nonzero()[:, 0]).tolist(), len(numbers)]
    if len(starts) > STRETCHES:
        least, most = int(numbers.min()), int(numbers.max())
        return read(name, slice(least, most + 1))[numbers - least]
    firsts = [(int(numbers[start]), end - start) for start, end in pairwise(starts)]
    parts = [read(name, slice(first, first + count)) for first, count in firsts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class Vocabulary:
    """The tokens of the merged model.

    Attributes:
        numbers: token → number; empty where nothing is known of tokens.
        source: folder of the tokenizer; None for the base's.
        tokenizer: the tokenizer itself, where no folder has it.
        theirs: task → token → the expert's own number, of experts that number tokens otherwise than the output; the
            base, where it does, has an empty name.
        tables: as in `TokenRows`; empty where every model's own rows are the merged model's.
        pad: number of the token that texts are padded with, where it is known.
        fits: experts whose own rows are known by their tokens, however many there are.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    source: Path | None = None
    tokenizer: Any = None
    theirs: dict[str, dict[str, int]] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    pad: int | None = None
    fits: frozenset[str] = frozenset()

    def merged_numbers(self, task: str) -> dict[int, int]:
        """An expert's own number of a token → the merged model's, of those it has; the base's where `task` is empty."""
        theirs = self.theirs.get(task, {})
        return {own: self.numbers[token] for token, own in theirs.items() if token in self.numbers}

    def renumbered(self, task: str, config: dict[str, Any]) -> dict[str, Any]:
        """The content of a config, whose tokens have an expert's own numbers, with the merged model's."""
        numbers = self.merged_numbers(task)

        def merged(value: Any) -> Any:
            if isinstance(value, list):
                return [merged(part) for part in value]
            return numbers.get(value, value) if type(value) is int else value

        def changed(field: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {part: changed(part, inner) for part, inner in value.items()}
            return merged(value) if field.endswith(TOKEN_FIELDS) else value

        return {field: changed(field, value) for field, value in config.items()} if numbers else config

    def as_merged(self, task: str, name: str, shape: tuple[int, ...], merged: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that an expert's tensor has in the merged model, whose shape there is `merged`."""
        if name not in self.tables or task not in self.fits or len(shape) != len(merged):
            return shape
        dimension = self.tables[name]
        return tuple(merged[i] if i == dimension else size for i, size in enumerate(shape))
