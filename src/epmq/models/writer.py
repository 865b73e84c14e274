"""The one writer of checkpoints: every tensor goes straight to its final place, each byte once.

Dtypes and shapes of all tensors are known before any is computed, and with them the files, their headers and the place
of every number. Tensors may come in any order, and a file may be gone on with where an earlier process has stopped.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.files import write_json
from epmq.models.checkpoint import DTYPE_NAMES, DTYPES, INDEX, SINGLE, TensorSpec, byte_size
from epmq.models.pieces import Piece, piece_of

# A shard of an output is full when it holds this much.
SHARD_BYTES = 4 << 30
# Bytes that are written before they go to the disk and out of memory.
HELD = 1 << 26


class CheckpointWriter(ExitStack):
    """Writes the tensors of a checkpoint; its files are closed by `close`, or at the end of a `with` block.

    Args:
        folder: an existing directory.
        specs: name → dtype and shape of every tensor, in the order in which shards are filled.
        shard_bytes: a shard is full when it holds this much.
        reread: whether the output is read soon. Else what was written is let go of: in the system's cache it would push
            out what is still to be read, and memory that has to be found first costs more time than the writing.

    Attributes:
        files: of the weights, in `folder`. What lies in them already stays until it is written over.
        order: names of all tensors as they follow one another in the files.
        total: bytes of all tensors.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], shard_bytes: int = SHARD_BYTES, reread: bool = True
    ) -> None:
        super().__init__()
        self.folder, self.specs, self._reread = folder, dict(specs), reread
        self.total = sum(map(byte_size, self.specs.values()))
        shards = _shards(self.specs, shard_bytes)
        several = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self.files = several if len(shards) > 1 else [SINGLE]
        self._handles: list[BinaryIO] = []
        self._offsets: dict[str, tuple[BinaryIO, int]] = {}
        for file, shard in zip(self.files, shards):
            header, offsets = make_header(shard)
            handle = self.enter_context((folder / file).open("r+b" if (folder / file).exists() else "w+b"))
            handle.write(header)
            handle.truncate(len(header) + sum(map(byte_size, shard.values())))
            self._handles.append(handle)
            self._offsets |= {name: (handle, len(header) + offset) for name, offset in offsets.items()}
        self.order = list(self._offsets)

    def write(self, name: str, parts: Tensor | Iterable[Tensor]) -> None:
        """Write one tensor, or its parts along its first dimension, of which one is in memory.

        It is in the dtype of its spec; what has not the size of its spec is named in an InputError. The name may be
        that of a piece of a tensor (`epmq.models.pieces`); the rest of that stays as it is.
        """
        piece = piece_of(name)
        if piece is not None:
            self._write_piece(piece, parts)
            return
        (handle, offset), size, written = self._offsets[name], byte_size(self.specs[name]), 0
        handle.seek(offset)
        for part in [parts] if isinstance(parts, Tensor) else parts:
            numbers = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            written += len(numbers)
            if written <= size:  # else it would run into the next tensor
                handle.write(numbers.data)
            if not self._reread and (offset + written) // HELD != (offset + written - len(numbers)) // HELD:
                _let_go(handle)
        if written != size:
            raise InputError(f"tensor {name!r} has {written} bytes, not the {size} expected")

    def _write_piece(self, piece: Piece, parts: Tensor | Iterable[Tensor]) -> None:
        """Write a piece of a tensor: what lies between its rows is read and written with them."""
        tensor = torch.cat([parts] if isinstance(parts, Tensor) else list(parts)).detach().cpu()
        (handle, offset), entry = self._entry(piece)
        place = piece.take(entry)
        if place.shape != tensor.shape:
            raise InputError(f"tensor {piece.name!r} is {list(tensor.shape)}, not the {list(place.shape)} expected")
        place.copy_(tensor)
        handle.seek(offset)
        handle.write(entry.reshape(-1).view(torch.uint8).numpy().data)

    def _entry(self, piece: Piece) -> tuple[tuple[BinaryIO, int], Tensor]:
        """Where the entry begins that a piece lies in, and what is written there."""
        (dtype, shape), (handle, offset) = self.specs[piece.tensor], self._offsets[piece.tensor]
        piece.shape(shape)
        if piece.index is not None:
            shape = shape[1:]
            offset += piece.index * byte_size((dtype, shape))
        return (handle, offset), self._read(handle, offset, (dtype, shape))

    def tensor(self, name: str) -> Tensor:
        """Read back a tensor or a piece of one that has been written."""
        piece = piece_of(name)
        if piece is not None:
            return piece.take(self._entry(piece)[1]).contiguous()
        return self._read(*self._offsets[name], self.specs[name])

    def _read(self, handle: BinaryIO, offset: int, spec: TensorSpec) -> Tensor:
        dtype, shape = spec
        handle.seek(offset)
        content = bytearray(handle.read(byte_size(spec)))
        if not content:
            return torch.empty(shape, dtype=DTYPES[dtype])
        return torch.frombuffer(content, dtype=DTYPES[dtype]).reshape(shape)

    def sync(self) -> None:
        """See everything that was written onto the disk."""
        for handle in self._handles:
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self) -> None:
        """Hand everything to the system, and write the index, if there are several files."""
        for handle in self._handles:
            handle.flush()
        if len(self.files) > 1:
            shards = {name: Path(self._offsets[name][0].name).name for name in self.specs}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": shards})


def specs_on_disk(specs: Mapping[str, TensorSpec], whole: Callable[[str], tuple[int, ...]]) -> dict[str, TensorSpec]:
    """Dtypes and shapes of tensors on disk, in their order, from those of tensors and of pieces (`epmq.models.pieces`).

    `whole` is the shape of a tensor that there are pieces of; its dtype is one that holds all of them.
    """
    found = dict[str, TensorSpec]()
    for name, (dtype, shape) in specs.items():
        piece = piece_of(name)
        if piece is None:
            found[name] = dtype, shape
            continue
        held = found.get(piece.tensor, (dtype, ()))[0]
        both = torch.promote_types(DTYPES[held], DTYPES[dtype])
        found[piece.tensor] = DTYPE_NAMES[both], whole(piece.tensor)
    return found


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Which tensors go into which shard, in order."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if filled >= shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += byte_size(spec)
    return shards


def _let_go(handle: BinaryIO) -> None:
    """See what was written onto the disk, and out of the system's cache."""
    if hasattr(os, "posix_fadvise"):
        handle.flush()
        os.fdatasync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where each tensor's bytes begin behind it."""
    # The order in which safetensors itself writes, so that every tensor is aligned: by dtype, then by name.
    dtypes = list(DTYPES)
    names = sorted(specs, key=lambda name: (dtypes.index(specs[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + byte_size(specs[name])
        entries[name] = {"dtype": specs[name][0], "shape": specs[name][1], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, {name: entries[name]["data_offsets"][0] for name in names}
