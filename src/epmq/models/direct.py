"""Writing a checkpoint whose tensors are known before they are computed: each byte once, straight to its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from epmq.errors import InputError
from epmq.models.checkpoint import TensorSpec, byte_size
from epmq.models.writer import SHARD_BYTES, make_header, shard_files, write_index

# Bytes that are written before they go to the disk and out of memory.
HELD = 1 << 26


def write_directly(
    folder: Path,
    forms: Mapping[str, TensorSpec],
    read: Callable[[str], Iterable[Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[str]:
    """Write a checkpoint, a part of a tensor at a time; nothing but that part is in memory.

    Args:
        folder: an existing directory.
        forms: name → dtype and shape of each tensor.
        read: gives a tensor in parts that follow one another along its first dimension, in that dtype.
        shard_bytes: a shard is full when it holds this much.

    Yields:
        each tensor's name when it has been written.

    Raises:
        ValueError: the parts of a tensor are not what its form says; it is named.
    """
    shards = _shards(forms, shard_bytes)
    files = shard_files(len(shards))
    for file, shard in zip(files, shards):
        header, names = make_header(shard)
        with (folder / file).open("wb") as out:
            out.write(header)
            for name in names:
                written = sum(_write(out, part) for part in read(name))
                if written != byte_size(forms[name]):
                    raise InputError(f"tensor {name!r} has {written} bytes, not the {byte_size(forms[name])} expected")
                yield name
    write_index(folder, dict(zip(files, shards)), sum(map(byte_size, forms.values())))


def _shards(forms: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Which tensors go into which shard, in order."""
    shards: list[dict[str, TensorSpec]] = [{}]
    held = 0
    for name, form in forms.items():
        if held >= shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = form
        held += byte_size(form)
    return shards


def _write(out: BinaryIO, tensor: Tensor) -> int:
    """Append a tensor's numbers to a file; returns how many bytes they are.

    Nothing here reads an output again. Left in the system's cache it would take memory, which costs more time than the
    writing where that memory has to be found first, and push out what is still to be read.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    start = out.tell()
    size = out.write(flat.view(torch.uint8).numpy().data)
    if start // HELD != (start + size) // HELD and hasattr(os, "posix_fadvise"):
        out.flush()
        os.fdatasync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size
