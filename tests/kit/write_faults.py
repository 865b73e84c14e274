"""Whether a run whose disk fails ends with a clear error, leaves no half of an output, and can go on to the same bytes.

Two ways: the n-th operation that writes (opening a file for it, making or renaming a folder, syncing) fails, for every
n; and the run writes to a small file system that is full at some point, at any byte of any file.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Bytes of a file system that is large enough.
ENOUGH = 1 << 30
WRITES = os.O_WRONLY | os.O_RDWR
# Sizes of the small file system, as shares of what the run needs.
SHARES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
Run = Callable[[Path], None]


class Counts:
    """Counts what came of one sort of fault, under names that begin with the fault's."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.by_name = {fault + end: 0 for end in ("", "_refused", "_torn", "_resumed_identical", "_left_behind")}

    def add(self, end: str, happened: bool = True) -> None:
        self.by_name[self.fault + end] += happened


class FailingDisk:
    """Counts the operations that write below a folder, and lets one of them fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self._fails, self._counting = str(folder), 0, -1, False
        sys.addaudithook(self._hear)

    @contextmanager
    def failing(self, number: int) -> Iterator[None]:
        """Let the operation of that number fail, −1 for none, within a `with` block."""
        sync = os.fsync

        def fsync(handle: int) -> None:
            self._step()
            sync(handle)

        self.count, self._fails, self._counting = 0, number, True
        os.fsync = fsync  # type: ignore[assignment]
        try:
            yield
        finally:
            self._counting, os.fsync = False, sync

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._counting or event not in ("open", "os.mkdir", "os.rename", "os.chmod"):
            return
        writes = event != "open" or bool(args[2] & WRITES)
        if writes and isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(self.folder):
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self.count - 1 == self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_everywhere(run: Run, folder: Path, same: Callable[[Path], bool], every: int = 1) -> dict[str, int]:
    """Let one write fail after the other.

    Args:
        run: does the run, into the folder it is given.
        folder: an empty directory, in which it writes.
        same: whether an output is what it should be.
        every: try only every so many writes.

    Returns:
        write_faults, and how many of them ended in an OSError that names a file (write_faults_refused), left an output
        that is not what it should be (write_faults_torn), and went on to the right output when the disk was mended
        (write_faults_resumed_identical).
    """
    disk, out = FailingDisk(folder), folder / "out"
    counts = Counts("write_faults")
    with disk.failing(-1):
        run(out)
    shutil.rmtree(out)
    for number in range(0, disk.count, every):
        counts.add("")
        try:
            with disk.failing(number):
                run(out)
        except OSError as error:
            counts.add("_refused", error.filename is not None)
        _mend(run, folder, same, counts)
    return counts.by_name


def fill_disks(run: Run, folder: Path, needed: int, same: Callable[[Path], bool]) -> dict[str, int]:
    """Do the run on file systems that are too small, and again when they are large enough; wants to be root.

    Args:
        run, same: as above.
        folder: where the file systems appear.
        needed: bytes that the run writes.

    Returns:
        as above, with full_disks in place of write_faults.
    """
    counts = Counts("full_disks")
    for share in SHARES:
        with small_disk(folder, int(share * needed)) as disk:
            try:
                run(disk / "out")
                continue
            except OSError as error:
                counts.add("")
                counts.add("_refused", error.errno == errno.ENOSPC or "No space left" in str(error))
            subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", str(disk)], check=True)
            _mend(run, disk, same, counts)
    return counts.by_name


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes.

    Raises:
        PermissionError: it cannot be mounted.
    """
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True).returncode:
        folder.rmdir()
        raise PermissionError("no file system can be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # a map of a file may be open still
        folder.rmdir()


def _mend(run: Run, folder: Path, same: Callable[[Path], bool], counts: Counts) -> None:
    """The same run again, on a disk that works; counts what came of both."""
    out = folder / "out"
    if out.exists():
        counts.add("_torn", not same(out))
        shutil.rmtree(out)
    run(out)
    counts.add("_resumed_identical", same(out))
    shutil.rmtree(out)
    counts.add("_left_behind", bool(os.listdir(folder)))
