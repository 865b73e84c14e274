"""The folder in which a run works until its output is whole: blocks that are finished survive whatever ends the run."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from epmq.errors import EnvironmentFault, InputError
from epmq.files import check_output, differences, named_in_errors, publish, write_whole

LOG = logging.getLogger("epmq")
INPUTS, LOCK, BLOCKS, OUTPUT = "inputs.json", "lock", "blocks", "output"


class Journal:
    """The finished blocks of a run, in order, each a file that appears whole or not at all.

    Their tensors lie in the output's files by then. Iterate to get each block's name and its layers' reports.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = list(takewhile(Path.exists, map(self._file, count())))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:05d}.json"

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for file in self._files:
            content = json.loads(file.read_text(encoding="utf-8"))
            yield content["name"], content["reports"]

    def append(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Note that a block is finished; when this returns it is on the disk."""
        file = self._file(len(self))
        write_whole(file, json.dumps({"name": name, "reports": reports}, ensure_ascii=False).encode())
        self._files.append(file)

    def clear(self) -> None:
        """Forget all blocks."""
        while self._files:
            self._files.pop().unlink()


@dataclass
class Workdir:
    """An open work folder: a folder in it that becomes the output, one of what is kept, and in that the blocks."""

    output: Path
    kept: Path
    journal: Journal


@contextmanager
def resumable(path: str | Path, inputs: Mapping[str, Any], restart: bool = False) -> Iterator[Workdir]:
    """A work folder whose `output` becomes `path` when the `with` block ends well.

    When it does not, finished blocks stay, and the next run on the same inputs finds them.

    Args:
        path: the output directory; the work folder is `.NAME.work` beside it.
        inputs: all that decides the result, as plain values; kept beside the work.
        restart: throw away what an earlier run has left.

    Raises:
        OutputExistsError, OutputDeniedError: see `check_output`.
        InputError: an earlier run with other inputs has left its work; what has changed is named.
        EnvironmentFault: another process is at work on the same output.
    """
    path = check_output(path).absolute()
    folder = _workdir_of(path)
    output = folder / OUTPUT
    with named_in_errors(folder):
        (folder / BLOCKS).mkdir(parents=True, exist_ok=True)
    with named_in_errors(folder), _locked(folder):
        published = False
        try:
            _take_over(folder, json.loads(json.dumps(inputs)), restart)
            output.mkdir(exist_ok=True)
            yield Workdir(output, folder / BLOCKS, Journal(folder / BLOCKS))
            publish(output, path)
            published = True
        finally:
            # The first entry is what lies in no block, which is soon done again.
            kept = [] if published else [file for file in (folder / BLOCKS).iterdir() if file.stem != f"{0:05d}"]
            if kept:
                blocks = len([file for file in kept if file.suffix == ".json"])
                LOG.warning("%d finished blocks are kept in %s: the same run goes on from there", blocks, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def remove_stale_workdir(path: str | Path) -> None:
    """Remove the work folder of a run that was killed when its output had just appeared."""
    path = Path(path).expanduser().absolute()
    folder = _workdir_of(path)
    if path.exists() and folder.is_dir() and not (folder / OUTPUT).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _workdir_of(path: Path) -> Path:
    return path.parent / f".{path.name}.work"


def _take_over(folder: Path, inputs: dict[str, Any], restart: bool) -> None:
    """Make sure that what lies in the folder is of the same inputs, or throw it away where that is asked for."""
    file = folder / INPUTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if before is not None and not restart and before != inputs:
        changes = "; ".join(differences(before, inputs))
        raise InputError(
            f"{folder} holds the work of a run that was stopped, and since then there are changes ({changes}): "
            "undo them to go on, or begin anew with --restart (restart=True)"
        )
    if before is None or restart:
        shutil.rmtree(folder / BLOCKS)
        shutil.rmtree(folder / OUTPUT, ignore_errors=True)
        (folder / BLOCKS).mkdir()
    write_whole(file, json.dumps(inputs, indent=2, ensure_ascii=False).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however that ends."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise EnvironmentFault(f"{folder}: another process is at work there") from None


def hash_batches(batches: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of model inputs, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
