"""What the process runs on: device, versions, hardware, memory, progress bars, the garbage collector."""

from __future__ import annotations

import atexit
import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from epmq.errors import InputError, reason

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

# Python's own thresholds of the garbage collector.
YOUNG = (700, 10, 10)
PACKAGES = ("epmq", "torch", "transformers", "compressed-tensors", "safetensors", "numpy")


def select_device(name: str) -> torch.device:
    """The device of that name; `auto` takes an accelerator if there is one.

    Raises:
        InputError: there is no such device, or PyTorch cannot use it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.zeros(1, device=name).is_meta:
            raise RuntimeError("it computes nothing")
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        raise InputError(
            f"device: {name} cannot be used here ({reason(error):.120}); auto takes what there is"
        ) from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def hardware() -> dict[str, Any]:
    """Processor, threads and accelerator."""
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "accelerator": cuda}


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


def memory_mb() -> float:
    """Resident memory now, in MB of 10⁶ bytes."""
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def reset_peak_memory() -> None:
    """Start measuring the peak of resident memory anew (Linux; elsewhere the peak stays that of the process)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak resident memory since `reset_peak_memory`, in MB of 10⁶ bytes; psutil has none on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system; glibc would keep gigabytes in holes of its heap."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def progress_bars(show: bool) -> Progress:
    """Progress bars on standard error."""
    from rich import progress
    from rich.console import Console

    counts = progress.BarColumn(), progress.MofNCompleteColumn()
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    columns = progress.TextColumn("{task.description}"), *counts, *times
    return progress.Progress(*columns, console=Console(stderr=True), disable=not show)


def spare_gc() -> None:
    """For a command's own process: look for garbage rarely, and never at the end.

    torch and transformers make a million objects that stay; looking through them is a good part of their import.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Leave all objects that there are, mostly imported modules, out of collections during a `with` block."""
    before, threshold = gc.get_freeze_count(), gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*YOUNG)  # what a run leaves behind holds memory
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        if not before:  # else they are somebody else's to let go
            gc.unfreeze()
