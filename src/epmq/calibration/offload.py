"""Keep tensors in files while nobody reads them.

Calibration activations grow with the number of examples, and each of them is read a few times only. A tensor that is
offloaded stays wherever it is referred to, such as in a model's forward that waits: only its memory is the system's to
take from then on, and is read back when it is touched.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

# Smaller tensors are not worth a file, bytes.
SMALLEST = 1 << 20


class Offloader:
    """Puts tensors into nameless files in a folder on a disk; each goes with its tensor. None offloads nothing."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder

    def put(self, values: Iterable[object]) -> None:
        """Put tensors among some values into files. Those on an accelerator, small and offloaded ones stay as they are.

        Raises:
            OSError: the disk is full.
        """
        if self._folder is None:
            return
        for value in values:
            if isinstance(value, Tensor) and value.device.type == "cpu" and value.nbytes >= SMALLEST:
                self._put(value)

    @torch.no_grad()
    def _put(self, tensor: Tensor) -> None:
        if tensor.untyped_storage().filename is None:
            mapped = self._map(tensor.numel(), tensor.dtype).view(tensor.shape)
            tensor.set_(mapped.copy_(tensor))  # type: ignore[call-overload]
        # Tell the system that the pages are not needed for now; they stay in the file.
        if advice := getattr(mmap, "MADV_DONTNEED", None):
            storage = tensor.untyped_storage()
            ctypes.CDLL(None).madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), advice)

    def _map(self, count: int, dtype: torch.dtype) -> Tensor:
        handle, path = tempfile.mkstemp(dir=self._folder)
        try:
            size = count * dtype.itemsize
            # Blocks are taken now: a full disk is an error here, and would be a signal later.
            os.posix_fallocate(handle, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(handle, size)
            return torch.from_file(path, shared=True, size=count, dtype=dtype)
        finally:
            os.close(handle)
            os.unlink(path)
