import copy
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from epmq import matmul as products
from epmq.matmul import addmm_, fast_transpose, linear, matmul
from epmq.models.blocks import use_fast_matmul

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="no oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "as PyTorch does"])
def uses_onednn(request, monkeypatch) -> bool:
    """Both ways, whatever this processor is."""
    monkeypatch.setattr(products, "uses_onednn", lambda: request.param)
    return request.param


def laid_out(rows: int, columns: int, layout: str) -> torch.Tensor:
    """A random matrix: contiguous, part of a larger one, or the transpose of such."""
    if layout.startswith("transposed "):
        return laid_out(columns, rows, layout.removeprefix("transposed ")).T
    large = torch.randn(rows + 3, columns + 5)
    return large[2 : 2 + rows, 1 : 1 + columns] if layout == "part" else large[:rows, :columns].contiguous()


LAYOUTS = ["whole", "part", "transposed whole", "transposed part"]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_every_layout_gives_the_product(uses_onednn, left, right):
    one, other, total = laid_out(40, 70, left), laid_out(70, 50, right), torch.randn(40, 50)
    wanted = (one.double() @ other.double()).float()
    torch.testing.assert_close(matmul(one, other), wanted, rtol=1e-4, atol=1e-4)
    part = torch.zeros(60, 60)[5:45, 5:55]
    assert addmm_(part.copy_(total), one, other, alpha=-2) is part
    torch.testing.assert_close(part, total - 2 * wanted, rtol=1e-4, atol=1e-4)


@given(rows=st.integers(0, 40), inner=st.integers(0, 40), columns=st.integers(0, 40), double=st.booleans())
def test_any_size_and_dtype(rows, inner, columns, double):
    dtype = torch.float64 if double else torch.float32
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    with mock.patch.object(products, "uses_onednn", lambda: ONEDNN):
        found = matmul(left, right)
    assert found.dtype == dtype
    torch.testing.assert_close(found, left @ right, rtol=1e-4, atol=1e-4)


def test_a_transpose_is_one(uses_onednn):
    rows = torch.randn(30, 20)
    assert torch.equal(fast_transpose(rows), rows.T)
    assert fast_transpose(rows).is_contiguous() == uses_onednn


@pytest.mark.parametrize("size", [(2048, 512, 512), (128, 3000, 600), (64, 4096, 64)])
def test_the_number_of_threads_changes_no_bit(uses_onednn, size):
    rows, inner, columns = size
    left, right, before = torch.randn(rows, inner), torch.randn(inner, columns), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(matmul(left, right))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layer_is_one(uses_onednn, bias, dtype):
    inputs, weight = torch.randn(2, 5, 30, dtype=dtype), torch.randn(20, 30, dtype=dtype)
    offset = torch.randn(20, dtype=dtype) if bias else None
    with torch.no_grad():
        found = linear(inputs, weight, offset)
    torch.testing.assert_close(found, nn.functional.linear(inputs, weight, offset), rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    """Gives twice what a linear layer gives."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


def test_a_model_gives_what_it_gave(uses_onednn):
    model = nn.Sequential(nn.Linear(30, 40), nn.GELU(), Conv1D(20, 40), Doubled(20, 10, bias=False))
    inputs = torch.randn(2, 7, 30)
    with torch.no_grad():
        wanted = model(inputs)
        use_fast_matmul(model)
        torch.testing.assert_close(model(inputs), wanted)
        nn.init.zeros_(model[0].weight)  # what a layer holds later counts
        nn.init.zeros_(model[0].bias)
        torch.testing.assert_close(model(inputs), model[1:](torch.zeros(2, 7, 40)))
        torch.testing.assert_close(model.double()(inputs.double()).float(), model.float()(inputs))


def test_a_quick_model_can_be_trained_copied_and_kept(uses_onednn):
    model = nn.Sequential(nn.Linear(30, 40), Conv1D(20, 40))
    use_fast_matmul(model)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(torch.randn(3, 30)).square().sum().backward()
        assert all(float(parameter.grad.norm()) > 0 for parameter in same.parameters())
        same.zero_grad()


@needs_onednn
def test_it_is_taken_where_it_is_faster(monkeypatch):
    def found(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        return products.uses_onednn.__wrapped__()

    monkeypatch.delenv("EPMQ_ONEDNN", raising=False)
    assert found(avx512_f=True, sse4a=True)
    assert not found(avx512_f=True, sse4a=False)  # Intel: MKL uses all there is
    assert not found(avx512_f=False, sse4a=True)
    assert not found()
    monkeypatch.setenv("EPMQ_ONEDNN", "0")
    assert not found(avx512_f=True, sse4a=True)
    monkeypatch.delenv("EPMQ_ONEDNN")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not products.uses_onednn.__wrapped__()
