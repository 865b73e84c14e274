import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from conftest import padded_batches, perturbed, recipe_for, tiny_dinov2
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForPreTraining,
    BertModel,
    BitImageProcessorPil,
    Dinov2Model,
)

import epmq
from epmq.export import FORMATS, packed
from epmq.export.form import Form
from epmq.models.checkpoint import DTYPES
from epmq.pipeline.run import run
from epmq.quantization.grid import BITS, Grid, QuantizedTensor
from tests.kit.quantized import PLAIN_OUTSIDE, quantized_tensor

LAYERS = [
    f"encoder.layer.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"attention.self.{x}" for x in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    )
]


TABLE = "embeddings.word_embeddings"


def both_formats(recipe: dict[str, Any], folder: Path, **quantize: Any) -> tuple[Path, Path]:
    """The recipe's checkpoint as pack-quantized and as dequantized."""
    for name in FORMATS:
        settings = {"format": name, "output": str(folder / name), "quantize": quantize}
        run({**recipe, **settings}, progress=False, evaluate=False)
    return folder / "pack-quantized", folder / "dequantized"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def unpacked(tensors: dict[str, torch.Tensor], layer: str, grid: Grid) -> QuantizedTensor:
    """A layer from the tensors of a packed file, read with compressed-tensors' own unpacking."""
    shape = torch.Size(tensors[f"{layer}.weight_shape"].tolist())
    scale = tensors[f"{layer}.weight_scale"]
    codes = unpack_from_int32(tensors[f"{layer}.weight_packed"], grid.bits, shape)
    if grid.symmetric:
        return QuantizedTensor(codes, scale, torch.zeros_like(scale, dtype=torch.int8), grid, torch.float32)
    zero = unpack_from_int32(tensors[f"{layer}.weight_zero_point"], grid.bits, scale.shape, packed_dim=0)
    return QuantizedTensor(codes, scale, zero, grid, torch.float32)


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> dict[str, QuantizedTensor]:
    """Every layer that is handed to an exporter from now on."""
    emitted: dict[str, QuantizedTensor] = {}
    original = module.tensors

    def tensors(layer: str, weight: QuantizedTensor, form: Form) -> dict[str, torch.Tensor]:
        emitted[layer] = weight
        return original(layer, weight, form)

    monkeypatch.setattr(module, "tensors", tensors)
    return emitted


@torch.no_grad()
def outputs(model: Any, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    return [model.eval()(**batch).last_hidden_state for batch in batches]


def same_answers(first: Path, second: Path, batches: list[dict[str, torch.Tensor]], direct: bool = True) -> None:
    """Two checkpoints give the same outputs, bit for bit, through `from_pretrained`, and through `epmq.load`.

    Without `direct` the first is one that transformers alone cannot open.
    """
    model = epmq.load(first).backbone
    assert not any("weight_" in name for name in model.state_dict())
    if direct:
        for one, two in zip(outputs(model, batches), outputs(AutoModel.from_pretrained(first), batches), strict=True):
            assert torch.equal(one, two)
        loading = AutoModel.from_pretrained(first, output_loading_info=True)[1]
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    for one, two in zip(outputs(model, batches), outputs(AutoModel.from_pretrained(second), batches), strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, two)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_both_formats_are_the_same_model(pool, tmp_path, monkeypatch, bits, symmetric, group_size):
    emitted, grid = record(monkeypatch, packed), Grid(bits, group_size, symmetric)
    settings = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
    low, plain = both_formats(recipe_for(pool), tmp_path, **settings)
    # transformers alone (5.23) opens packed zero points only where all lies on one grid; then that is noted.
    notes = json.loads((low / "report.json").read_text())["notes"]
    opens = not any("AutoModel.from_pretrained cannot open" in note for note in notes)
    assert opens or not symmetric
    same_answers(low, plain, padded_batches(2, vocabulary=22), direct=opens)

    tensors, weights = load_file(low / "model.safetensors"), load_file(plain / "model.safetensors")
    assert sorted(emitted) == sorted([*LAYERS, TABLE, "pooler.dense"])
    table = emitted.pop(TABLE)
    assert table.grid == Grid(8, -1, symmetric) and torch.equal(tensors[f"{TABLE}.weight"], table.codes)
    assert torch.equal(table.dequantize(), weights[f"{TABLE}.weight"])
    for layer, weight in emitted.items():
        read = unpacked(tensors, layer, grid)
        assert torch.equal(read.codes, weight.codes) and torch.equal(read.zero_point, weight.zero_point)
        assert torch.equal(read.scale, weight.scale)
        assert torch.equal(read.dequantize(), weights[f"{layer}.weight"])
        assert weight.codes.unique().numel() > 2 and f"{layer}.weight" not in tensors

    # Everything else is the same in both files.
    plain_names = {name for name in weights if name.removesuffix(".weight") not in emitted}
    assert {name for name in tensors if ".weight_" not in name} == plain_names
    assert all(torch.equal(tensors[name], weights[name]) for name in plain_names - {f"{TABLE}.weight"})
    assert {tensors[name].dtype for name in plain_names - {f"{TABLE}.weight"}} == {torch.float16}

    config = config_of(low)["quantization_config"]
    group, other = config["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "mixed-precision"
    assert (group["format"], other["format"]) == ("pack-quantized", "int-quantized") and other["targets"] == [TABLE]
    assert (group["weights"]["num_bits"], group["weights"]["symmetric"]) == (bits, symmetric)
    assert group["weights"]["group_size"] == (None if group_size == -1 else group_size)
    assert group["weights"]["strategy"] == ("channel" if group_size == -1 else "group")
    assert config["ignore"] == []
    assert "quantization_config" not in config_of(plain)


def test_four_bits_take_four_bits(pool, tmp_path):
    run(recipe_for(pool, output=str(tmp_path / "out")), progress=False, evaluate=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in LAYERS:
        rows, columns = tensors[f"{layer}.weight_shape"].tolist()
        assert tensors[f"{layer}.weight_packed"].nbytes == rows * columns // 2
        assert tensors[f"{layer}.weight_scale"].shape == (rows, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "expert_guided"])
def test_16_bit_models_stay_16_bit(pool, tmp_path, dtype, method):
    for folder in ("base", "experts/one", "experts/two"):
        BertModel.from_pretrained(pool / folder, dtype=dtype).save_pretrained(tmp_path / folder)
    recipe = recipe_for(pool, base=str(tmp_path / "base"))
    for expert in recipe["experts"]:
        expert["model"] = str(tmp_path / "experts" / expert["name"])
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (pool / "base" / name).exists():
            (tmp_path / "base" / name).write_bytes((pool / "base" / name).read_bytes())
    low, plain = both_formats(recipe, tmp_path / "out", method=method, group_size=32, symmetric=False)
    for batch in padded_batches(2, vocabulary=22):
        one, two = (outputs(epmq.load(folder).backbone, [batch])[0] for folder in (low, plain))
        assert torch.isfinite(one).all() and torch.equal(one, two)
    weights = load_file(plain / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {dtype}
    assert load_file(low / "model.safetensors")[f"{LAYERS[0]}.weight_scale"].dtype == dtype
    assert epmq.load(low, dtype="auto").backbone.dtype == AutoModel.from_pretrained(plain).dtype == dtype


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe over tiny DINOv2 models."""
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    tiny_dinov2().save_pretrained(folder / "base")
    mean = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    BitImageProcessorPil(do_resize=False, do_center_crop=False, **mean).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 28, 28, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=pixels, labels=generator.integers(0, 3, 12))
    experts = []
    for seed, task in enumerate(("one", "two"), start=1):
        perturbed(Dinov2Model.from_pretrained(folder / "base"), seed).save_pretrained(folder / task)
        experts.append({"name": task, "model": str(folder / task), "calibration": {"path": str(folder / "data.npz")}})
    return {"base": str(folder / "base"), "experts": experts, "batch_size": 8}


def test_old_names_on_disk_are_kept(images, tmp_path):
    """transformers 5 renames DINOv2's layers when it loads; on disk they keep the names every reader knows."""
    low, plain = both_formats(images, tmp_path, bits=4, group_size=32, symmetric=False)
    names = set(load_file(Path(images["base"]) / "model.safetensors"))
    assert "encoder.layer.0.attention.attention.query.weight" in names
    assert set(load_file(plain / "model.safetensors")) == names
    stored = set(load_file(low / "model.safetensors"))
    assert "encoder.layer.0.attention.attention.query.weight_packed" in stored
    assert {name.replace("weight_packed", "weight") for name in stored} >= names
    # transformers 5.22 and 5.23 cannot read any packed DINOv2 (its converter for another layout gets in the way).
    batches = [{"pixel_values": torch.randn(2, 3, 28, 28)} for _ in range(2)]
    expected = outputs(AutoModel.from_pretrained(plain), batches)
    for folder in (low, plain):
        for output, plain_output in zip(outputs(epmq.load(folder).backbone, batches), expected, strict=True):
            assert torch.equal(output, plain_output)
    (group,) = config_of(low)["quantization_config"]["config_groups"].values()
    assert group["weights"]["num_bits"] == 4 and config_of(low)["architectures"] == ["Dinov2Model"]
    assert (low / "preprocessor_config.json").exists()


def test_a_base_with_a_head_of_its_own_is_stored_under_its_prefix(pool, tmp_path):
    """Base and experts are `BertForPreTraining` files; what they share is the `BertModel` in them."""
    model = BertForPreTraining(BertConfig.from_pretrained(pool / "base"))
    model.save_pretrained(tmp_path / "base")
    recipe = recipe_for(pool, base=str(tmp_path / "base"))
    for seed, expert in enumerate(recipe["experts"]):
        expert["model"] = str(tmp_path / expert["name"])
        perturbed(BertForPreTraining.from_pretrained(tmp_path / "base"), seed).save_pretrained(expert["model"])
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (pool / "base" / name).exists():
            (tmp_path / "base" / name).write_bytes((pool / "base" / name).read_bytes())
    low, plain = both_formats(recipe, tmp_path / "out")
    assert f"bert.{LAYERS[0]}.weight_packed" in load_file(low / "model.safetensors")
    same_answers(low, plain, padded_batches(2, vocabulary=22))


def test_transformers_reads_zero_points_where_all_lies_on_one_grid(pool, tmp_path):
    low, plain = both_formats(recipe_for(pool), tmp_path, symmetric=False, **PLAIN_OUTSIDE)
    same_answers(low, plain, padded_batches(2, vocabulary=22))


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_tensors_are_as_their_specs_say_and_give_the_weight_back(bits, symmetric, group_size):
    """36 rows: in 3 bits neither rows nor columns fill their words."""
    weight = quantized_tensor(Grid(bits, group_size, symmetric), rows=36)
    form = Form(weight.grid, torch.bfloat16, torch.bfloat16)
    tensors = packed.tensors("layer", weight, form)
    specs = packed.specs("layer", (36, 64), form)
    assert {name: (DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert torch.equal(packed.weight("layer", tensors.__getitem__, form), weight.dequantize())


def test_the_codes_are_left_alone():
    weight = quantized_tensor(Grid(3, 32, False))
    codes, before = weight.codes.clone(), weight.dequantize()
    tensors = packed.tensors("layer", weight, Form(weight.grid))
    assert all(name.startswith("layer.weight") for name in tensors)
    assert torch.equal(weight.codes, codes) and torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_of_8_bits_is_plain_int8_with_scales_for_all_its_names(symmetric):
    weight = quantized_tensor(Grid(8, 32, symmetric))
    form = Form(weight.grid, torch.bfloat16, torch.bfloat16, table=True, followers=("lm_head",))
    tensors, specs = packed.tensors("table", weight, form), packed.specs("table", (5, 64), form)
    leaves = ["weight_scale"] + ([] if symmetric else ["weight_zero_point"])
    assert set(tensors) == {"table.weight", *(f"{name}.{leaf}" for name in ("table", "lm_head") for leaf in leaves)}
    assert {name: (DTYPES[dtype], shape) for name, (dtype, shape) in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert torch.equal(tensors["table.weight"], weight.codes)
    assert torch.equal(packed.weight("table", tensors.__getitem__, form), weight.dequantize())
    assert packed.format_of(Form(Grid(4), table=True)) == "pack-quantized"


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_in_parts_is_packing_at_once(monkeypatch, bits):
    weight = quantized_tensor(Grid(bits, 32, False), rows=36)
    form = Form(weight.grid, torch.bfloat16, torch.bfloat16)
    whole = packed.tensors("layer", weight, form)
    monkeypatch.setattr(packed, "CHUNK", 200)
    parts = packed.tensors("layer", weight, form)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert torch.equal(packed.weight("layer", parts.__getitem__, form), weight.dequantize())


def test_every_grid_is_a_group_and_the_most_frequent_is_that_of_all_linear_layers():
    forms = {f"layers.{i}.a": Form(Grid(3, 32)) for i in range(3)} | {"d": Form(Grid(8)), "e": Form(Grid(8))}
    forms["table"] = Form(Grid(8), table=True, followers=("lm_head",))
    config = packed.config(forms, ["pooler"])
    groups = config["config_groups"].values()
    found = [(group["targets"], group["weights"]["num_bits"], group["format"]) for group in groups]
    assert found[0] == (["Linear"], 3, "pack-quantized")
    assert (["d", "e"], 8, "pack-quantized") in found and (["table", "lm_head"], 8, "int-quantized") in found
    assert len(found) == 3 and config["format"] == "mixed-precision" and config["ignore"] == ["pooler"]
    alone = packed.config({"layers.0.a": Form(Grid(4, 32, False))}, [])
    assert alone["format"] == "pack-quantized" and alone["dequantize"] is True


def test_what_lies_outside_the_blocks_is_named_on_the_grid_of_all_linear_layers_too():
    grid = Grid(4, 32)
    forms = {"layers.0.a": Form(grid), "table": Form(grid, table=True), "lm_head": Form(grid)}
    [group] = packed.config(forms, [])["config_groups"].values()
    assert group["targets"] == ["table", "lm_head", "Linear"]
