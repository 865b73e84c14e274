"""Writing: a checkpoint shard by shard, files and directories that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from epmq.errors import InputError
from epmq.files import write_json
from epmq.models.checkpoint import INDEX, PROCESSOR_FILES, SINGLE, TensorSpec, bits_of, byte_size

# Bytes that are copied at once.
COPIED = 1 << 24
# Bytes of tensors that are held in memory before they are written.
PART_BYTES = 1 << 25
# A shard of an output is full when it holds this much.
SHARD_BYTES = 4 << 30


class CheckpointWriter:
    """Writes tensors as they come, in small parts, and puts the parts together into shards at the end.

    Args:
        folder: an existing directory.
        shard_bytes: a shard is full when it holds this much.
        part_bytes: so much is held in memory at most, beside one tensor.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, part_bytes: int = PART_BYTES) -> None:
        self.folder, self.shard_bytes, self.part_bytes = folder, shard_bytes, min(part_bytes, shard_bytes)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[Path]] = []  # each with its parts
        self._shard_bytes = shard_bytes
        self._parts = 0
        self.sizes: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor.

        Raises:
            ValueError: the name was written before.
        """
        if name in self.sizes:
            raise InputError(f"tensor {name!r} is written twice")
        self.sizes[name] = tensor.numel() * tensor.element_size()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += self.sizes[name]
        if self._pending_bytes >= self.part_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._shard_bytes >= self.shard_bytes:
            self._shards.append([])
            self._shard_bytes = 0
        part = self.folder / f"part-{self._parts}"
        save_tensors(self._pending, part, {"format": "pt"})
        self._shards[-1].append(part)
        self._shard_bytes += self._pending_bytes
        self._parts += 1
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write the last part and put the shards together and, if there are several, their index."""
        self._flush()
        files = shard_files(len(self._shards))
        names = [join(parts, self.folder / file) for parts, file in zip(self._shards, files)]
        write_index(self.folder, dict(zip(files, names)), sum(self.sizes.values()))


def shard_files(count: int) -> list[str]:
    """What the files of a checkpoint in so many shards are called."""
    several = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [SINGLE] if count == 1 else several


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of a checkpoint in several shards; one file needs none.

    Args:
        folder: where the shards are.
        shards: file → names of its tensors.
        total: bytes of all tensors.
    """
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def join(parts: Sequence[Path], target: Path) -> list[str]:
    """Make one safetensors file of several, which vanish; their bytes are copied and not interpreted.

    Args:
        parts: safetensors files with different tensors.
        target: the file to write.

    Returns:
        the tensors' names.
    """
    if len(parts) == 1:
        parts[0].rename(target)
        with safe_open(str(target), framework="pt") as whole:
            return list(whole.keys())
    forms: dict[str, TensorSpec] = {}
    places: dict[str, tuple[Path, int]] = {}
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        forms |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        places |= {name: (part, 8 + length + entry["data_offsets"][0]) for name, entry in entries.items()}
    header, names = make_header(forms)
    with target.open("wb") as out, ExitStack() as stack:
        files = {part: stack.enter_context(part.open("rb")) for part in parts}
        out.write(header)
        for name in names:
            part, begin = places[name]
            files[part].seek(begin)
            for left in range(byte_size(forms[name]), 0, -COPIED):
                out.write(files[part].read(min(left, COPIED)))
    for part in parts:
        part.unlink()
    return names


def make_header(forms: Mapping[str, TensorSpec]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file, and its tensors' names in the order in which their bytes follow."""
    # The order that the format asks for, so that every tensor is aligned: by falling size of the numbers, then by name.
    names = sorted(forms, key=lambda name: (-bits_of(forms[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + byte_size(forms[name])
        entries[name] = {"dtype": forms[name][0], "shape": forms[name][1], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, names


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    try:
        save_file(dict(tensors), str(path), metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def copy_processor(source: Path, target: Path) -> None:
    """Copy tokenizer and processor files, as they are."""
    for name in PROCESSOR_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
