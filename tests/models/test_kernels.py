"""Kernels for codes: their layouts are found out, and one that errs is not used."""

import pytest
import torch

from epmq.models import kernels
from epmq.models.kernels import FEW_ROWS, Int4, Int8, fitting, row_chunks
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.rtn import rtn

VECTORS = torch.backends.cpu.get_cpu_capability() in kernels.VECTORS
needs_vectors = pytest.mark.skipif(not VECTORS, reason="the processor has no kernels for codes")


def weight(rows: int, columns: int, grid: Grid) -> QuantizedTensor:
    return rtn(torch.randn(rows, columns), grid, scale_dtype=torch.float16)


def error(product: torch.Tensor, expected: torch.Tensor) -> float:
    return float((product - expected).norm() / expected.norm())


@needs_vectors
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("rows", [64, 96, 48])
def test_products_of_4_bit_codes_are_off_by_bfloat16_alone(rows, group, symmetric):
    coded = weight(rows, 256, Grid(4, group, symmetric))
    kernel = fitting(coded, table=False)
    if kernel is None:  # rows that are no whole tiles of this processor's kernel
        assert rows % 64
        return
    assert isinstance(kernel, Int4) and torch.equal(kernel.codes(slice(None)), coded.codes)
    inputs = torch.randn(FEW_ROWS, 256)
    assert error(kernel.multiply(inputs), inputs @ coded.dequantize().float().T) < 6e-3


@needs_vectors
def test_products_of_8_bit_codes_with_a_scale_a_row():
    coded = weight(47, 96, Grid(8, -1, True))
    kernel, inputs = fitting(coded, table=True), torch.randn(3, 96)
    assert isinstance(kernel, Int8) and kernel.held.data_ptr() == coded.codes.data_ptr()
    assert error(kernel.multiply(inputs), inputs @ coded.dequantize().float().T) < 6e-3


@pytest.mark.parametrize(
    ("rows", "columns", "grid", "table"),
    [
        (64, 64, Grid(4, 32), True),  # its rows are looked up
        (64, 64, Grid(2, 32), False),
        (64, 64, Grid(3, -1), False),
        (64, 64, Grid(8, 32), False),
        (64, 64, Grid(8, -1, False), False),
        (64, 72, Grid(4, -1), False),  # no group of a kernel divides the columns
        (7, 64, Grid(4, 32), False),
        (64, 42, Grid(8, -1), False),  # which would crash
    ],
)
def test_what_has_no_kernel(rows, columns, grid, table):
    assert fitting(weight(rows, columns, grid), table) is None


@needs_vectors
def test_a_kernel_that_is_wrong_or_missing_is_not_used(monkeypatch):
    four, eight = weight(64, 64, Grid(4, 32)), weight(64, 64, Grid(8, -1))
    assert fitting(four, table=False) is not None and fitting(eight, table=False) is not None
    for kind, right in ((Int4, Int4.multiply), (Int8, Int8.multiply)):
        monkeypatch.setattr(kind, "multiply", lambda self, inputs, right=right: 1.05 * right(self, inputs))
    assert fitting(four, table=False) is None and fitting(eight, table=False) is None
    monkeypatch.undo()
    for name in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"):
        monkeypatch.setattr(torch.ops.aten, name, None)
        monkeypatch.delattr(torch.ops.aten, name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert fitting(four, table=False) is None and fitting(eight, table=False) is None


@pytest.mark.parametrize(("rows", "columns"), [(8, 32), (8, 128), (16, 1)])
def test_the_layout_of_any_kernel_that_works_in_tiles_is_found_out(monkeypatch, rows, columns):
    order = torch.randperm(rows * columns)

    def convert(codes: torch.Tensor) -> torch.Tensor:
        """Tiles one after the other, their codes in some order, two of them in a byte."""
        tiles = codes.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
        low, high = tiles.reshape(-1, rows * columns)[:, order].chunk(2, dim=1)
        return (low | high << 4).view(torch.int32 if rows * columns > 16 else torch.uint8)

    monkeypatch.setattr(kernels, "_converter", lambda device, width: convert)
    monkeypatch.setattr(kernels, "_layout", kernels._layout.__wrapped__)
    coded = weight(48, 256, Grid(4, 64, False))
    layout = kernels._layout(torch.device("cpu"), rows, columns)
    assert layout is not None and torch.equal(layout.order, order.argsort())
    kernel = Int4(coded, layout, 64)
    assert torch.equal(kernel.codes(slice(None)), coded.codes)
    assert torch.equal(kernel.codes(slice(16, 48)), coded.codes[16:48])
    monkeypatch.setattr(kernels, "_converter", lambda device, width: lambda codes: convert(codes) * 0)
    assert kernels._layout(torch.device("cpu"), rows, columns) is None


def test_chunks_cover_all_rows_and_cut_no_tile(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 1000)
    for shape in ((200, 7), (64, 3000), (1, 1), (130, 1000)):
        chunks = list(row_chunks(shape))
        assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
        assert chunks[0].start == 0 and chunks[-1].stop == shape[0] and all(chunk.start % 64 == 0 for chunk in chunks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 128, False), Grid(4, -1), Grid(8, -1)])
def test_kernels_of_a_gpu(grid):
    coded = weight(256, 512, grid).to(torch.device("cuda"))
    kernel, inputs = fitting(coded, table=False), torch.randn(4, 512, device="cuda")
    assert kernel is not None, "this GPU, or this version of PyTorch, has no kernel for it"
    assert torch.equal(kernel.codes(slice(None)), coded.codes)
    assert error(kernel.multiply(inputs), inputs @ coded.dequantize().float().T) < 6e-3
