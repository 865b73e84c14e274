import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_for
from safetensors.torch import load_file

import epmq
from epmq.errors import InputError
from epmq.export import gptq
from epmq.export.form import Form
from epmq.export.target import Coded, Contents
from epmq.models.codes import CodedCheckpoint
from epmq.pipeline.exporting import contents_of
from epmq.quantization.grid import Grid
from tests.kit.quantized import quantized_tensor

GRIDS = [Grid(4, 32), Grid(4, -1), Grid(2, 32), Grid(8, -1), Grid(4, 32, False), Grid(8, 64, False)]
LAYER = "encoder.layer.0.output.dense"


def checkpoint(pool: Path, folder: Path, grid: Grid, **quantize: Any) -> Path:
    """A packed checkpoint of the pool, rounded to nearest."""
    settings = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric, **quantize}
    recipe = recipe_for(pool, quantize={"method": "rtn", **settings}, output=str(folder))
    epmq.run(recipe, progress=False, evaluate=False)
    return folder


def words_to_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes down the first dimension of words, read bit by bit: code k lies in the bits from k · bits on."""
    ones = np.unpackbits(words.T.copy().view(np.uint8), axis=1, bitorder="little")
    codes = ones.reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits))
    return codes.T.astype(np.int64)


def unpacked(tensors: dict[str, torch.Tensor], layer: str, bits: int) -> np.ndarray:
    """The weight [out, in] of a layer by the definition of version 1 of the format, in float32."""
    codes, scales, groups = (tensors[f"{layer}.{name}"].numpy() for name in ("qweight", "scales", "g_idx"))
    zeros = words_to_codes(tensors[f"{layer}.qzeros"].numpy().T, bits).T + 1
    steps = words_to_codes(codes, bits) - zeros[groups]
    return (steps * scales.astype(np.float32)[groups]).T


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_written_weights_are_those_of_the_checkpoint(pool: Path, tmp_path: Path, grid: Grid) -> None:
    source = checkpoint(pool, tmp_path / "packed", grid)
    report = epmq.export_checkpoint(source, "gptq", tmp_path / "out", progress=False)
    folder, coded = tmp_path / "out" / "gptq", CodedCheckpoint(source)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    found = config.pop("quantization_config")
    assert (found["bits"], found["sym"], found["desc_act"]) == (grid.bits, grid.symmetric, False)
    assert found["group_size"] == (64 if grid.group_size == -1 else grid.group_size)
    assert config == coded.config and (folder / "tokenizer.json").exists()
    assert report["bytes"] == (folder / "model.safetensors").stat().st_size and report["verified"] is None
    for name in coded.weights():
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" in tensors:
            assert (unpacked(tensors, layer, grid.bits) == coded.codes(layer).dequantize().float().numpy()).all()
        else:
            assert torch.equal(tensors[name], coded.tensor(name)) and tensors[name].dtype == coded.tensor(name).dtype
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    assert packed == {layer for layer in coded.grids if layer.startswith("encoder.layer")}


def test_a_run_writes_it_beside_its_output(pool: Path, tmp_path: Path) -> None:
    recipe = recipe_for(pool, quantize={"method": "rtn", "group_size": 32}, formats=["gptq"])
    report = epmq.run({**recipe, "output": str(tmp_path / "out")}, progress=False, evaluate=False)
    assert [one["target"] for one in report["exports"]] == ["gptq"]
    assert (tmp_path / "out" / "gptq" / "model.safetensors").exists()


def test_a_mere_merge_is_written_for_no_runtime(pool: Path, tmp_path: Path) -> None:
    recipe = recipe_for(pool, quantize={"method": "rtn", "group_size": 32}, formats=["gptq"])
    report = epmq.merge({**recipe, "output": str(tmp_path / "out")}, progress=False)
    assert report["exports"] == [] and not (tmp_path / "out" / "gptq").exists()


def test_an_export_that_was_stopped_is_in_no_output(pool: Path, tmp_path: Path, monkeypatch: Any) -> None:
    recipe = recipe_for(pool, quantize={"method": "rtn", "group_size": 32}, output=str(tmp_path / "out"))

    def begin(source: CodedCheckpoint, folder: Path) -> list[Path]:
        (folder / "gptq").mkdir()
        (folder / "gptq" / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gptq, "write", begin)
        # as if it was killed: nothing is cleared away
        patch.setattr(tempfile, "TemporaryDirectory", lambda **where: nullcontext(tempfile.mkdtemp(**where)))
        epmq.run({**recipe, "formats": ["gptq"]}, progress=False, evaluate=False)
    report = epmq.run(recipe, progress=False, evaluate=False)
    assert any("were finished by a run that was stopped" in note for note in report["notes"])
    assert not (tmp_path / "out" / "gptq").exists() and [file.name for file in tmp_path.iterdir()] == ["out"]


def test_words_are_filled_from_their_low_bits() -> None:
    codes = torch.arange(8, dtype=torch.int32)[:, None].repeat(1, 2)
    assert gptq.pack_rows(codes, 4).tolist() == [[0x76543210, 0x76543210]]
    assert gptq.pack_rows(torch.full((4, 1), 255, dtype=torch.int32), 8).tolist() == [[-1]]


def contents(**forms: Form | None) -> Contents:
    """A checkpoint with layers of [64, 96] in two blocks; by name another form, or None for a plain weight."""
    given = {"a": Form(Grid(4, 32), scale=torch.float16), **forms}
    layers = {f"model.layers.{i}.{name}": form for i in range(2) for name, form in given.items()}
    plain = {f"{name}.weight": (64, 96) for name, form in layers.items() if form is None}
    return Contents({}, {name: Coded((64, 96), form) for name, form in layers.items() if form}, plain)


HALF = Form(Grid(4, 32), scale=torch.float16)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"b": replace(HALF, grid=Grid(8, 32)), "c": HALF}, r"layers\.0\.b on a grid of bits: 8.* fits: bits: 4"),
        ({"a": replace(HALF, grid=Grid(3, 32))}, r"layers\.0\.a on a grid of bits: 3.*fits: bits: 4"),
        ({"b": replace(HALF, scale=torch.float32)}, r"layers\.0\.b are float32: use scale_dtype: float16"),
        ({"b": replace(HALF, transposed=True)}, r"layers\.0\.b is stored as \[in, out\]"),
        ({"a": None}, "no layer of a block is quantized"),
    ],
)
def test_what_does_not_fit_is_named_before_any_compute(forms: dict[str, Form | None], message: str) -> None:
    gptq.check(contents(b=HALF))
    with pytest.raises(InputError, match=message):
        gptq.check(contents(**forms))


def test_a_layer_that_is_skipped_is_named(pool: Path, tmp_path: Path) -> None:
    overrides = [{"layers": "*.1.output.dense", "skip": True}]
    source = CodedCheckpoint(checkpoint(pool, tmp_path / "packed", Grid(4, 32), overrides=overrides))
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense is not quantized"):
        gptq.check(contents_of(source))


def test_shapes_that_fill_no_words_are_named() -> None:
    one = Contents({}, {"layers.0.a": Coded((60, 64), HALF)}, {})
    with pytest.raises(InputError, match=r"layers\.0\.a is \[60, 64\], which are no multiples of the 8 codes"):
        gptq.check(one)
    rows = replace(HALF, grid=Grid(4, -1))
    with pytest.raises(InputError, match=r"the 72 columns of layers\.0\.a are no multiple of 16"):
        gptq.check(Contents({}, {"layers.0.a": Coded((64, 72), rows)}, {}))


def test_scales_and_zero_points_that_have_no_place_are_named() -> None:
    weight = quantized_tensor(Grid(4, 32, False), 8, 64, torch.bfloat16)
    weight.zero_point.clamp_(min=-7)
    gptq.layer_tensors(LAYER, weight, 32)
    weight.zero_point[3, 1] = -8
    with pytest.raises(InputError, match=f"a zero point of {LAYER} is the lowest code.*symmetric: true"):
        gptq.layer_tensors(LAYER, weight, 32)
    tiny = replace(weight, scale=weight.scale * 2.0**-30)
    with pytest.raises(InputError, match=f"scales of {LAYER} are too small"):
        gptq.layer_tensors(LAYER, tiny, 32)
