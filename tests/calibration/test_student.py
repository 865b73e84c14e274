import pytest
import torch
from conftest import padded_batches, tiny_bert
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from epmq.calibration.student import ScaledProduct, Student
from epmq.models.heads import Head
from epmq.models.multitask import MultiTaskModel
from epmq.models.packed import PackedWeight, pack
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.rtn import rtn
from tests.kit.quantized import quantized_tensor

GRIDS = [Grid(4, -1), Grid(3, 32, False), Grid(8, 64)]


def packed_in(dtype: torch.dtype, grid: Grid) -> PackedWeight:
    weight = quantized_tensor(grid, rows=6, columns=64, dtype=torch.float32)
    weight.dtype = dtype
    return PackedWeight(weight, dtype, kernels=False)


def grouped(packed: PackedWeight, factor: Tensor) -> Tensor:
    """The weight with its factors, for autograd."""
    return (packed.dequantize().unflatten(1, (factor.shape[1], -1)) * factor.unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_plain_weight(grid):
    packed = packed_in(torch.float64, grid)
    inputs = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    factor = (1 + 0.1 * torch.randn(packed.scale.shape, dtype=torch.float64)).requires_grad_()
    seen = torch.randn(2, 5, 6, dtype=torch.float64)
    given = ScaledProduct.apply(inputs, factor, packed)
    plain = nn.functional.linear(inputs, grouped(packed, factor))
    torch.testing.assert_close(given, plain)
    for own, expected in zip(
        torch.autograd.grad((given * seen).sum(), [inputs, factor]),
        torch.autograd.grad((plain * seen).sum(), [inputs, factor]),
    ):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_gradient_is_made_that_nobody_asks_for(grid):
    packed = packed_in(torch.float64, grid)
    factor = torch.ones(packed.scale.shape, dtype=torch.float64, requires_grad=True)
    ScaledProduct.apply(torch.randn(3, 64, dtype=torch.float64), factor, packed).sum().backward()
    assert factor.grad is not None and factor.grad.shape == packed.scale.shape


def student_of(grid: Grid, scale: torch.dtype = torch.float32) -> Student:
    """A tiny BERT whose blocks are in codes, with a head."""
    model = tiny_bert()
    for name, module in list(model.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            pack(module, PackedWeight(rtn(module.weight.detach(), grid, scale_dtype=scale), kernels=False))
            assert model.get_submodule(f"encoder.{name}") is module
    head = Head(torch.randn(3, 64), torch.randn(3), "mean")
    dtypes = {name: torch.float16 for name, _ in model.named_parameters()}
    dtypes |= {Student.HEAD.format("one", leaf): torch.float32 for leaf in ("weight", "bias")}
    return Student(MultiTaskModel(model, {"one": head}), [f"encoder.layer.{i}" for i in range(2)], dtypes)


def outputs(student: Student) -> Tensor:
    return MultiTaskModel(student.backbone, student.heads)("one", **padded_batches(1)[0])


def moved(student: Student) -> Student:
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape)).add_(0.01)
    return student


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_factors_in_the_scales_give_what_they_gave_in_training(grid):
    student = student_of(grid)
    before = outputs(student).detach()
    student._dtypes = dict.fromkeys(student._dtypes, torch.float32)
    trained = outputs(moved(student)).detach()
    with student.as_stored():
        torch.testing.assert_close(outputs(student), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(student).detach(), trained, rtol=0, atol=0)  # training goes on where it was
    assert not torch.allclose(before, trained, atol=1e-3)


def test_what_is_trained_is_all_but_codes_and_tables():
    student = student_of(GRIDS[0])
    names = set(student.parameters)
    assert {"encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"} <= names  # scales
    assert {"embeddings.LayerNorm.weight", "encoder.layer.0.intermediate.dense.bias", "heads/one.weight"} <= names
    assert not any("word_embeddings" in name or "position" in name for name in names)
    outputs(student).sum().backward()
    untrained = {name for name, parameter in student.parameters.items() if parameter.grad is None}
    assert untrained == {"pooler.dense.bias"}  # which this head does not read
    assert not any(p.requires_grad for name, p in student.backbone.named_parameters() if name not in names)


def test_stored_tensors_have_the_dtypes_of_the_file():
    student = moved(student_of(GRIDS[0], torch.float16))
    stored = student.stored()
    assert stored["encoder.layer.0.output.dense"].dtype == torch.float16
    assert stored["embeddings.LayerNorm.bias"].dtype == torch.float16
    assert stored["heads/one.bias"].dtype == torch.float32
    assert not torch.equal(stored["encoder.layer.0.output.dense"], student.start["encoder.layer.0.output.dense"])


def test_a_scale_too_small_for_its_dtype_stays():
    student = student_of(GRIDS[0], torch.float16)
    name = "encoder.layer.0.output.dense"
    student.parameters[name].data.fill_(1e-8)
    assert torch.equal(student.stored()[name], student.start[name])


def test_a_student_begins_again_wherever_the_file_is():
    student, refined = student_of(GRIDS[0], torch.float16), moved(student_of(GRIDS[0], torch.float16))
    start, first = student.start, outputs(student).detach()
    again = student_of(GRIDS[0], torch.float16)
    again.begin_at(refined.stored())
    again.begin_at(start)
    assert all(torch.equal(tensor, start[name]) for name, tensor in again.stored().items())
    again.heads = {task: head for task, head in again.heads.items()}
    assert outputs(student).detach().equal(first)


def test_layers_stored_in_and_out_turned_round():
    layer = Conv1D(6, 64)
    packed = PackedWeight(rtn(layer.weight.detach().T, GRIDS[1]), kernels=False)
    pack(layer, packed)
    model = nn.Sequential(layer)
    student = Student(MultiTaskModel(Wrapped(model), {}), [], {"inner.0.bias": torch.float32})
    factor = student.parameters["inner.0"]
    factor.data.mul_(1.5)
    inputs = torch.randn(3, 64)
    torch.testing.assert_close(layer(inputs), inputs @ grouped(packed, factor).T + layer.bias)


class Wrapped(nn.Module):
    """Something with a forward that takes inputs by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


def test_codes_do_not_move():
    student = student_of(GRIDS[1])
    layer = student.backbone.get_submodule("encoder.layer.0.output.dense")
    before: QuantizedTensor = layer.quantized()
    optimizer = torch.optim.Adam(student.parameters.values(), lr=0.01)
    outputs(student).square().sum().backward()
    optimizer.step()
    assert layer.quantized().codes.equal(before.codes) and layer.quantized().zero_point.equal(before.zero_point)
    assert not student.stored()["encoder.layer.0.output.dense"].equal(before.scale)
