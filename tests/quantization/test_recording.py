"""Operations that a GPU records: on a pretended GPU, which replays by calling, and on a real one if there is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hessians import hessian_of

from epmq.quantization import gptq as solver
from epmq.quantization import recording
from epmq.quantization.factor import factorize
from epmq.quantization.gptq import KEPT_BYTES, _Block, gptq
from epmq.quantization.grid import Grid
from epmq.quantization.recording import CALLS, Shelf

GRIDS = [Grid(4, -1, True), Grid(3, 32, False)]


class PretendedGpu:
    """Like `recording.Gpu`, on the processor: what is recorded is not computed, and replaying calls it."""

    def __init__(self, refuses: bool = False) -> None:
        self.fails, self.refuses, self.asides, self.records, self.replays = False, refuses, 0, 0, 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture(autouse=True)
def shelf(monkeypatch) -> Shelf[_Block]:
    """An empty shelf for each test."""
    empty = Shelf[_Block](KEPT_BYTES)
    monkeypatch.setattr(solver, "_kept", empty)
    return empty


@pytest.fixture
def gpu(monkeypatch) -> PretendedGpu:
    pretended = PretendedGpu()
    monkeypatch.setattr(recording, "gpu_of", lambda device: pretended)
    return pretended


def solve(columns: int, grid: Grid, seed: int = 0, device: str = "cpu", rows: int = 24) -> list[torch.Tensor]:
    """Codes and losses of a made layer."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factor = factorize(hessian_of(columns, seed).to(device))
    quantized, loss = gptq(weight.to(device), factor, grid)
    return [quantized.codes, loss]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other))


@pytest.mark.parametrize("grid", GRIDS, ids=["symmetric", "asymmetric"])
def test_blocks_are_called_then_recorded_once_then_replayed(monkeypatch, grid):
    """640 columns are five blocks of 128; a second weight finds the recording of the first."""
    expected = [solve(640, grid, seed) for seed in (1, 2)]
    gpu = PretendedGpu()
    monkeypatch.setattr(recording, "gpu_of", lambda device: gpu)
    assert same(solve(640, grid, 1), expected[0])
    assert (gpu.asides, gpu.records, gpu.replays) == (CALLS, 1, 5 - CALLS)
    assert same(solve(640, grid, 2), expected[1])
    assert (gpu.asides, gpu.records, gpu.replays) == (CALLS, 1, 10 - CALLS)


def test_one_or_two_blocks_are_not_recorded(gpu):
    for columns in (96, 256):
        solve(columns, GRIDS[0])
    assert (gpu.records, gpu.replays) == (0, 0)


def test_the_last_block_has_a_recording_of_its_own(gpu):
    for seed in range(4):
        solve(160, GRIDS[0], seed)
    assert (gpu.records, gpu.replays) == (2, 2 * (4 - CALLS))


def test_what_differs_shares_no_block(gpu, shelf):
    """Neither do products of another precision."""
    calls = ((96, Grid(4)), (96, Grid(3)), (96, Grid(4, -1, False)), (64, Grid(4)))
    for columns, grid in calls:
        solve(columns, grid)
    solve(96, Grid(4), rows=8)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    try:
        solve(96, Grid(4))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert len(shelf._things) == 6


def test_a_recording_that_fails_is_tried_once_and_called_from_then_on(monkeypatch):
    expected = solve(640, GRIDS[1])
    gpu = PretendedGpu(refuses=True)
    monkeypatch.setattr(recording, "gpu_of", lambda device: gpu)
    assert same(solve(640, GRIDS[1]), expected) and same(solve(640, GRIDS[1]), expected)
    assert (gpu.asides, gpu.records, gpu.replays) == (CALLS, 1, 0)
    solve(640, GRIDS[0])  # whose blocks are others
    assert (gpu.asides, gpu.records, gpu.replays) == (2 * CALLS, 1, 0)


def test_the_processor_records_and_keeps_nothing(shelf):
    solve(640, GRIDS[0])
    assert recording.gpu_of(torch.device("cpu")) is None and not shelf._things
    assert recording.gpu_of(torch.device("mps")) is None and _Block(8, torch.empty(4, 8), GRIDS[0]).recorded is None


@pytest.mark.parametrize("grid", GRIDS, ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("columns", [1, 16, 40, 256])
def test_operations_compute_in_the_buffers(columns, grid):
    """A replay writes where the recording wrote: an operation that makes a tensor would leave it there."""
    block = _Block(columns, torch.empty(6, columns), grid)
    buffers = (block.weight, block.compensated, block.scale, block.code, block.error, block.feedback, block.bounds)
    for buffer in buffers:
        buffer.copy_(torch.rand_like(buffer))
    places = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert {operation().untyped_storage().data_ptr() for operation in block.operations} <= places
    assert block.nbytes == sum(buffer.nbytes for buffer in buffers)


@dataclass
class Thing:
    nbytes: int


def test_a_shelf_holds_so_many_bytes_and_drops_what_was_put_back_first():
    shelf = Shelf[Thing](10)
    for name, size in (("a", 4), ("b", 4), ("large", 11), ("c", 2)):
        shelf.put(name, Thing(size))
    assert shelf.take("large") is None and shelf.nbytes == 10
    shelf.put("a", shelf.take("a"))
    shelf.put("d", Thing(3))
    assert [shelf.take(name) is not None for name in "abcd"] == [True, False, True, True] and not shelf.nbytes


def test_a_shelf_hands_a_thing_to_one_only():
    shelf = Shelf[Thing](10)
    shelf.put("a", Thing(4))
    assert shelf.take("a") and shelf.take("a") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grid", GRIDS, ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("columns", [64, 128, 416, 640, 2336])
def test_a_replay_gives_the_bits_that_calls_give(monkeypatch, shelf, columns, grid):
    """Blocks of 128 and 256 columns, full ones and the last, each once at least from its recording."""
    seeds = range(CALLS + 2)
    with monkeypatch.context() as patched:
        patched.setattr(recording, "gpu_of", lambda device: None)
        called = [solve(columns, grid, seed, "cuda") for seed in seeds]
    replayed = [solve(columns, grid, seed, "cuda") for seed in seeds]
    assert all(same(one, other) for one, other in zip(called, replayed))
    kept = list(shelf._things.values())
    assert kept and all(isinstance(block.recorded._replay.__self__, torch.cuda.CUDAGraph) for block in kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_leaves_the_stream_as_it_was_and_computes_nothing():
    number = torch.ones(1, device="cuda:0")
    gpu = recording.gpu_of(number.device)

    def broken() -> None:
        number.add_(1)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gpu.record(broken)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and number.item() == 1
    replay = gpu.record(lambda: number.add_(1))
    assert number.item() == 1
    replay()
    replay()
    assert number.item() == 3
    with torch.cuda.stream(torch.cuda.Stream()):
        assert recording.gpu_of(number.device) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_leaves_memory_that_is_kept_for_reuse():
    number = torch.ones(1, device="cuda:0")
    gpu = recording.gpu_of(number.device)
    with gpu.aside():
        number.add_(1)
    torch.empty(64 << 20, device=number.device)  # whose memory is kept
    before = torch.cuda.memory_reserved()
    gpu.record(lambda: number.add_(1))
    assert torch.cuda.memory_reserved() >= before
