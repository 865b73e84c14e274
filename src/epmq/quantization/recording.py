"""Operations that a GPU records once, as a CUDA graph, and replays: calling them takes longer than what they do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch

# Times that operations are called before they are recorded. A recording takes as long as one and a half calls of them
# all, and saves most of each that follows: what is run once or twice does not pay for it.
CALLS = 2
# One thread at a time works beside the default stream, which has one stream for that.
_ASIDE = Lock()


class Gpu:
    """What recordings need of a GPU: a stream beside the default one, on which operations are tried and recorded.

    Attributes:
        fails: a recording has failed, and no other should be tried: PyTorch may not have cleared up after it.
    """

    def __init__(self, device: torch.device) -> None:
        self.fails = False
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is called within goes to the stream for recordings, in the order in which it is called.

        So cuBLAS gets its buffers for that stream, which a recording could not keep safely.
        """
        current = torch.cuda.current_stream(self._device)
        with _ASIDE:
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the same work on the current stream, each time that it is called; nothing is computed yet.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` would give back all memory that PyTorch keeps for reuse; what is asked for after that comes
        # in other pieces, and whole runs then took up to half as much again.
        with _ASIDE, torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay


_gpu = cache(Gpu)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that makes recordings for a device, given with its index: one of CUDA or ROCm, on its default stream.

    Recordings share buffers of cuBLAS, and one solve after the other uses the same buffers: only the order of a single
    stream keeps them apart.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return None
    return _gpu(device)


class Recorded:
    """Operations on buffers that stay where they are: called at first, replayed from then on.

    They must neither make tensors nor wait for the GPU.
    """

    def __init__(self, operations: Sequence[Callable[[], Any]], gpu: Gpu) -> None:
        self._operations, self._gpu = operations, gpu
        self._called = 0
        self._replay: Callable[[], None] | None = None

    def run(self) -> None:
        """Do the operations, with the same results to the bit, however they are done."""
        if self._replay is None and self._called == CALLS:
            self._replay = self._record()
        if self._replay:
            self._replay()
            return
        self._called += 1
        with self._gpu.aside():
            self._call()

    def _record(self) -> Callable[[], None]:
        if not self._gpu.fails:
            try:
                return self._gpu.record(self._call)
            except RuntimeError:  # nothing has been computed: the buffers are what they were
                self._gpu.fails = True
        return self._call

    def _call(self) -> None:
        for operation in self._operations:
            operation()


class Sized(Protocol):
    """Something that holds buffers."""

    nbytes: int


Kept = TypeVar("Kept", bound=Sized)


class Shelf(Generic[Kept]):
    """Things kept for the next who needs the same, up to so many bytes; what was put back longest ago goes first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._things = limit, OrderedDict[Hashable, Kept]()
        self._lock = Lock()

    def take(self, key: Hashable) -> Kept | None:
        """Hand over what is kept under a key; it is the caller's alone until put back."""
        with self._lock:
            return self._things.pop(key, None)

    def put(self, key: Hashable, thing: Kept) -> None:
        """Keep it, if it is not too large by itself."""
        with self._lock:
            self._things.pop(key, None)
            if thing.nbytes > self._limit:
                return
            self._things[key] = thing
            while self.nbytes > self._limit:
                self._things.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(thing.nbytes for thing in self._things.values())
