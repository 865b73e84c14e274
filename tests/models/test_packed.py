"""Layers that keep their weight in codes."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from epmq.models import kernels
from epmq.models.kernels import FEW_ROWS
from epmq.models.packed import (
    Bytes,
    LazyWeight,
    PackedConv1D,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    can_be_packed,
    pack,
)
from epmq.quantization.grid import BITS, Grid, QuantizedTensor
from epmq.quantization.rtn import rtn
from tests.kit.accelerator import pretended_accelerator

GRIDS = [Grid(bits, group, symmetric) for bits, group, symmetric in itertools.product(BITS, (-1, 32), (True, False))]


def coded(rows: int, columns: int, grid: Grid, dtype: torch.dtype | None = torch.float16) -> QuantizedTensor:
    made = rtn(torch.randn(rows, columns), grid, scale_dtype=torch.float16)
    made.dtype = dtype
    return made


def held(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def linear(weight: QuantizedTensor, bias: torch.Tensor | None = None, **settings: Any) -> PackedLinear:
    rows, columns = weight.codes.shape
    layer, packed = nn.Linear(columns, rows, bias=bias is not None), PackedWeight(weight, **settings)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(packed.dtype), requires_grad=False)
    pack(layer, packed)
    return layer


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.grid, one.dtype, one.scale.dtype) == (other.grid, other.dtype, other.scale.dtype)
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("codes", "scale", "zero_point"))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (70, 64), (5, 42)])
def test_a_layer_computes_what_the_plain_one_does(monkeypatch, grid, shape):
    monkeypatch.setattr(kernels, "CHUNK", 2048)
    if grid.group_size > 0 and shape[1] % grid.group_size:
        return
    weight, bias = coded(*shape, grid), torch.randn(shape[0])
    exact, quick = linear(weight, bias, kernels=False), linear(weight, bias)
    plain = weight.dequantize().float()
    for layer in (exact, quick):
        assert_same(layer.quantized(), weight)
        assert torch.equal(layer.packed.dequantize(), plain)
        assert layer.weight.shape == shape and layer.weight.dtype == torch.float32
    for rows in ((2, 3), (FEW_ROWS + 1,), (0,), ()):
        inputs = torch.randn(*rows, shape[1])
        expected = functional.linear(inputs, plain, bias)
        assert torch.equal(exact(inputs), expected)
        product = quick(inputs)
        assert product.shape == expected.shape and product.dtype == torch.float32
        if quick.packed.has_kernel and 0 < inputs.numel() <= FEW_ROWS * shape[1]:
            assert (product - expected).norm() < 6e-3 * expected.norm()
        else:
            assert torch.equal(product, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_holds_as_many_bytes_as_the_file(grid):
    rows, columns = 256, 512
    weight = coded(rows, columns, grid)
    groups = columns // grid.width(columns)
    zeros = 0 if grid.symmetric else rows * -(-groups * grid.bits // 8)
    on_disk = rows * columns * grid.bits // 8 + 2 * rows * groups + zeros
    exact = held(linear(weight, kernels=False))
    assert exact <= on_disk + 2 * rows  # zero points of a row of few groups fill up to three bytes
    quick = linear(weight)
    # A kernel's scales and zero points are two numbers of bfloat16 for each of its own groups.
    kernel = 4 * rows * (columns // min(256, grid.width(columns))) if quick.packed.has_kernel and grid.bits == 4 else 0
    assert held(quick) == exact + kernel


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_table_makes_the_rows_that_are_looked_up(grid):
    weight, ids = coded(30, 64, grid), torch.randint(0, 30, (2, 5))
    table = nn.Embedding(30, 64)
    pack(table, PackedWeight(weight, kernels=False, table=True))
    assert torch.equal(table(ids), functional.embedding(ids, weight.dequantize().float()))
    assert table(ids[:0]).shape == (0, 5, 64) and (table.num_embeddings, table.embedding_dim) == (30, 64)
    assert_same(table.quantized(), weight)


def test_a_weight_is_made_when_something_computes_with_it():
    layer = linear(coded(8, 32, Grid(2, 32)), dtype=torch.bfloat16)
    weight, plain = layer.weight, layer.packed.dequantize()
    assert isinstance(weight, LazyWeight) and (weight.dtype, weight.shape) == (torch.bfloat16, (8, 32))
    assert weight.device == torch.device("cpu") and "shape=(8, 32)" in repr(weight)
    assert torch.equal(weight * 2, plain * 2) and torch.equal(weight.float(), plain.float())
    inputs = torch.randn(3, 32).bfloat16()
    assert torch.equal(functional.linear(inputs, weight), functional.linear(inputs, plain))
    assert torch.equal(weight[2:4], plain[2:4]) and torch.equal(inputs @ weight.T, inputs @ plain.T)


class Scaled(nn.Embedding):
    """As some models have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


class Doubled(nn.Linear):
    """One that does not call `nn.Linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, 2 * self.weight, self.bias)


def test_layers_of_subclasses_stay_what_they_are():
    weight = coded(40, 32, Grid(4, 32))
    table, layer, ids, inputs = Scaled(40, 32), Doubled(32, 40), torch.arange(6), torch.randn(2, 32)
    shared = PackedWeight(weight, kernels=False, table=True)
    for module in (table, layer):
        pack(module, shared)
        assert isinstance(copy.deepcopy(module), type(module).__bases__[0])
    plain = weight.dequantize().float()
    assert torch.equal(table(ids), 3 * plain[ids])
    assert torch.equal(layer(inputs), functional.linear(inputs, 2 * plain, layer.bias))
    assert isinstance(table, Scaled) and isinstance(table, PackedEmbedding) and isinstance(layer, PackedLinear)
    assert held(nn.ModuleList([table, layer])) == held(shared) + 4 * 40
    assert not can_be_packed(nn.Embedding(3, 4, max_norm=1.0)) and not can_be_packed(nn.LayerNorm(3))


def test_a_layer_that_stores_its_weight_transposed():
    weight, layer, inputs = coded(64, 32, Grid(4, 32)), Conv1D(64, 32), torch.randn(3, 2, 32)
    plain = Conv1D(64, 32)
    plain.weight = nn.Parameter(weight.dequantize().float().T.contiguous())
    for kernels_too in (False, True):
        packed = Conv1D(64, 32)
        pack(packed, PackedWeight(weight, kernels=kernels_too))
        assert packed.weight.shape == (32, 64) and torch.equal(packed.weight + 0, plain.weight)
        expected, found = plain(inputs), packed(inputs)
        assert (found - expected).norm() < 6e-3 * expected.norm()
        assert packed.packed.has_kernel or torch.equal(found, expected)
    assert isinstance(packed, PackedConv1D) and can_be_packed(layer)
    assert_same(packed.quantized(), weight)


def test_codes_and_scales_outlive_a_cast():
    weight = coded(64, 64, Grid(4, 32, False))
    layer = linear(weight, torch.randn(64))
    layer.bfloat16()
    assert_same(layer.quantized(), weight)
    assert layer.weight.dtype == layer.bias.dtype == layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.float().packed.dequantize(), weight.dequantize().float())


def test_gradients_of_inputs_are_exact():
    layer, inputs = linear(coded(64, 64, Grid(4, 32))), torch.randn(2, 64, requires_grad=True)
    layer(inputs).sum().backward()
    assert torch.equal(inputs.grad, layer.packed.dequantize().sum(0).expand(2, -1))


def test_a_layer_is_packed_anew_on_another_device():
    weight = coded(64, 64, Grid(4, 32, False))
    with pretended_accelerator() as name:
        layer = linear(weight).to(name)
        assert {layer.packed.scale.device.type, layer.weight.device.type} == {name}
        assert isinstance(layer.packed.held, Bytes)  # there are no kernels there
        inputs = torch.randn(2, 64)
        assert torch.equal(layer(inputs.to(name)).cpu(), functional.linear(inputs, weight.dequantize().float()))
        assert_same(layer.cpu().quantized(), weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_on_a_gpu(grid):
    weight, inputs = coded(256, 512, grid), torch.randn(70, 512)
    layer = linear(weight).to("cuda")
    assert_same(layer.quantized().to(torch.device("cpu")), weight)
    for rows in (2, 70):
        expected = functional.linear(inputs[:rows].cuda(), weight.dequantize().float().cuda())
        assert (layer(inputs[:rows].cuda()) - expected).norm() < 6e-3 * expected.norm()
