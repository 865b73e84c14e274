"""The folder in which a run works until its output is whole: blocks that are finished survive whatever ends the run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from epmq.errors import EnvironmentFault, InputError
from epmq.files import check_output, differences, named_in_errors, publish, write_whole
from epmq.quantization.grid import Grid, QuantizedTensor

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger("epmq")
INPUTS, LOCK, BLOCKS, OUTPUT = "inputs.json", "lock", "blocks", "output"
_PARTS = ("codes", "scale", "zero_point")


@dataclass
class Block:
    """A finished block.

    Attributes:
        reports: what happened to its layers, as plain values.
        layers: name in the model → its quantized weight.
        tensors: name in the model → every other tensor, in the dtype it is written in.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, QuantizedTensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Journal:
    """The finished blocks of a run, in order, each in a file that appears whole or not at all.

    Args:
        folder: an existing directory.
        grid: of all quantized layers.

    Attributes:
        found: how many an earlier run has left.
    """

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        self._count = 0
        while self._file(self._count).exists():
            self._count += 1
        self.found = self._count

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Block]:
        return map(self.__getitem__, range(self._count))

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < self._count:
            raise IndexError(index)
        with safe_open(str(self._file(index)), framework="pt") as file:
            found = json.loads(file.metadata()["block"])
            layers = {
                name: QuantizedTensor(**{part: file.get_tensor(f"{part}:{name}") for part in _PARTS}, grid=self.grid)
                for name in found["layers"]
            }
            tensors = {name: file.get_tensor(f"tensor:{name}") for name in found["tensors"]}
        return Block(found["reports"], layers, tensors)

    def append(self, block: Block) -> None:
        """Keep one more block; when this returns it is on the disk."""
        tensors = {f"tensor:{name}": tensor for name, tensor in block.tensors.items()}
        for name, weight in block.layers.items():
            tensors |= {f"{part}:{name}": getattr(weight, part) for part in _PARTS}
        content = {"reports": block.reports, "layers": list(block.layers), "tensors": list(block.tensors)}
        # Layers that were solved together are views of one tensor, which a file cannot hold.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_whole(self._file(self._count), save(copies, metadata={"block": json.dumps(content)}))
        self._count += 1


@dataclass
class Workdir:
    """An open work folder.

    Attributes:
        folder: itself.
        output: an empty folder in it, which becomes the output.
    """

    folder: Path
    output: Path

    def journal(self, grid: Grid) -> Journal:
        return Journal(self.folder / BLOCKS, grid)


@contextmanager
def resumable(path: str | Path, inputs: Mapping[str, Any], restart: bool = False) -> Iterator[Workdir]:
    """A work folder whose `output` becomes `path` when the `with` block ends well.

    When it does not, finished blocks stay, and the next run on the same inputs finds them.

    Args:
        path: the output directory; the work folder is `.NAME.work` beside it.
        inputs: all that decides the result, as plain values; kept beside the work.
        restart: throw away what an earlier run has left.

    Raises:
        FileExistsError, PermissionError: see `check_output`.
        ValueError: an earlier run with other inputs has left its work; what has changed is named.
        RuntimeError: another process is at work on the same output.
    """
    path = check_output(path).absolute()
    folder = _folder(path)
    output = folder / OUTPUT
    (folder / BLOCKS).mkdir(parents=True, exist_ok=True)
    with named_in_errors(folder), _locked(folder):
        done = False
        try:
            _take_over(folder, json.loads(json.dumps(inputs)), restart)
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            yield Workdir(folder, output)
            publish(output, path)
            done = True
        finally:
            kept = 0 if done else len(list((folder / BLOCKS).glob("*.safetensors")))
            if kept:
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir(exist_ok=True)  # without it the output has appeared, see `remove_stale_workdir`
                LOG.warning("%d finished blocks are kept in %s: the same run goes on from there", kept, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def remove_stale_workdir(path: str | Path) -> None:
    """Remove the work folder of a run that was killed when its output had just appeared."""
    path = Path(path).expanduser().absolute()
    folder = _folder(path)
    if path.exists() and folder.is_dir() and not (folder / OUTPUT).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _folder(path: Path) -> Path:
    return path.parent / f".{path.name}.work"


def _take_over(folder: Path, inputs: dict[str, Any], restart: bool) -> None:
    """Make sure that what lies in the folder is of the same inputs, or throw it away where that is wanted."""
    file, before = folder / INPUTS, None
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
    if before is not None and not restart and before != inputs:
        changes = "; ".join(differences(before, inputs))
        raise InputError(
            f"{folder} holds the work of a run that was stopped, and since then there are changes ({changes}): "
            "undo them to go on, or begin anew with --restart (restart=True)"
        )
    if before is None or restart:
        shutil.rmtree(folder / BLOCKS)
        (folder / BLOCKS).mkdir()
    write_whole(file, json.dumps(inputs, indent=2, ensure_ascii=False).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however that ends."""
    with (folder / LOCK).open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentFault(f"{folder}: another process is at work there") from None
        yield


def hash_batches(batches: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of model inputs, in hexadecimal."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                found.update(f"{name} {value!r}".encode())
    return found.hexdigest()
