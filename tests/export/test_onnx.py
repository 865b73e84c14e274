"""Graphs of all families give in onnxruntime what `epmq.load` gives, from the same codes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import recipe_for
from families import FAMILIES

import epmq
from epmq.export import onnx
from epmq.export.onnx_layers import block_of, blocks_of, halves
from epmq.export.target import Contents
from epmq.models.checkpoint import COUNTS
from epmq.quantization.grid import BITS, Grid
from epmq.quantization.rtn import rtn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def shallow(family: str) -> Any:
    """A model of a family with one block in each stack: tracing takes a time that grows with them."""
    torch.manual_seed(0)
    config = FAMILIES[family].build().config
    if hasattr(config, "stage_names"):  # a backbone's features are counted by its blocks
        return FAMILIES[family].build()
    for part in {id(one): one for one in (config, *vars(config).values()) if hasattr(one, "to_dict")}.values():
        for name, value in part.to_dict().items():
            if name.endswith(COUNTS) and value == 2:
                setattr(part, name, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return type(FAMILIES[family].build())(config)


def quantized(model: Any, folder: Path, **quantize: Any) -> Path:
    """The model as its own only expert, rounded to nearest."""
    model.save_pretrained(folder / "base")
    recipe = {"base": str(folder / "base"), "experts": [{"name": "one", "model": str(folder / "base")}]}
    recipe |= {"quantize": {"method": "rtn", **quantize}, "output": str(folder / "out")}
    epmq.run(recipe, progress=False, evaluate=False)
    return folder / "out"


# Families whose graphs have nothing that those of others do not have.
LIKE_OTHERS = (
    "roberta",
    "distilbert",
    "vit",
    "clip_vision",
    "flan_t5",
    "smollm2",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
)
ALL = [pytest.param(family, marks=pytest.mark.rare if family in LIKE_OTHERS else ()) for family in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_a_family_runs_in_onnxruntime(family, tmp_path, monkeypatch):
    batches = [dict(batch) for batch in FAMILIES[family].batches()]
    for batch in batches:
        targets = batch.pop("decoder_input_ids", None)
        batch.pop("decoder_attention_mask", None)
        batch |= {} if targets is None else {"labels": targets}
    out = quantized(shallow(family), tmp_path)
    monkeypatch.setattr(onnx, "example_inputs", lambda model: {k: v for k, v in batches[0].items() if k != "labels"})
    source = onnx.CodedCheckpoint(out)
    files = onnx.write(source, tmp_path)
    assert len(files) == (2 if family in ("t5", "flan_t5", "bart") else 1)
    found = onnx.verify(tmp_path, out, batches)  # refuses what is off by more than 1e-4
    assert found["largest_error"] < 1e-5 and found["same_answers"] > 0.99


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size, symmetric", [(-1, True), (32, False), (-1, False)])
def test_blocks_hold_the_codes(bits, group_size, symmetric):
    torch.manual_seed(bits)
    grid = Grid(bits, group_size, symmetric)
    weight = rtn(torch.randn(6, 96), grid)
    form = blocks_of(weight)
    per, low = 8 // form["bits"], 1 << (form["bits"] - 1)

    def unpacked(packed: torch.Tensor) -> np.ndarray:
        shifts = np.arange(per) * form["bits"]
        return ((packed.numpy()[..., None] >> shifts) & ((1 << form["bits"]) - 1)).reshape(len(packed), -1) - low

    blocks = form["scales"].shape[1]
    codes = unpacked(form["codes"])[:, :96]
    zeros = np.zeros((6, blocks)) if symmetric else unpacked(form["zero_points"])[:, :blocks]
    assert np.array_equal(codes, weight.codes.numpy())
    spread = [np.repeat(part, form["block"], axis=1)[:, :96] for part in (zeros, form["scales"].numpy())]
    assert np.array_equal((codes - spread[0]).astype(np.float32) * spread[1], weight.dequantize().numpy())


@pytest.mark.parametrize("symmetric", [True, False])
def test_8_bits_are_two_halves(symmetric):
    torch.manual_seed(0)
    weight = rtn(3 * torch.randn(6, 64) + 1, Grid(8, 32, symmetric))
    upper, lower = halves(weight)
    assert all(part.codes.min() >= -8 and part.codes.max() <= 7 for part in (upper, lower))
    assert all(part.zero_point.min() >= -8 and part.zero_point.max() <= 7 for part in (upper, lower))
    both = upper.dequantize().double() + lower.dequantize().double()
    assert torch.allclose(both, weight.dequantize().double(), rtol=1e-6, atol=1e-6)


def test_a_row_with_one_scale_is_cut_where_that_takes_the_fewest_bytes():
    assert block_of(Grid(4, -1), 384) == 128 and block_of(Grid(4, -1), 1024) == 256
    assert block_of(Grid(2, -1), 1024) == 256 and block_of(Grid(8, 64), 384) == 64


def test_a_group_larger_than_browsers_take_is_cut():
    weight = rtn(torch.randn(3, 1024), Grid(4, 512))
    form = blocks_of(weight)
    assert form["block"] == 256 and torch.equal(form["scales"], weight.scale.repeat_interleave(2, 1))


@pytest.fixture(scope="module")
def exported(pool, tmp_path_factory) -> tuple[Path, Path]:
    """A run with two heads on zero points and a table of 3 bits, and its export, by the recipe's own `formats`."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    quantize = {"method": "rtn", "symmetric": False, "group_size": 32, "embeddings": 3}
    report = epmq.run(recipe_for(pool, quantize=quantize, formats=["onnx"], output=str(out)), progress=False)
    verified = report["exports"][0]["verified"]
    assert verified["examples"] > 0 and verified["largest_error"] < 1e-5
    assert report["exports"][0]["bytes"] == (out / "onnx" / "model_q4.onnx").stat().st_size
    return out, out / "onnx" / "model_q4.onnx"


def test_all_tasks_are_in_one_file(exported):
    out, file = exported
    session, model = onnx.open_session(file), epmq.load(out)
    assert [one.name for one in session.get_outputs()] == model.tasks == ["one", "two"]
    assert epmq.files.read_json(out / "onnx" / "tasks.json")["one"] == {"answers": "class", "labels": ["x", "y", "z"]}
    texts = ["a b", "c", "d e a b c"]
    inputs = dict(model.processor(texts, padding=True, return_tensors="pt"))
    expected = model.scores(texts)
    for task, found in onnx.run_session(session, inputs).items():
        assert torch.allclose(found, expected[task], atol=1e-5)


def test_the_graph_holds_codes_and_one_backbone(exported):
    import onnx as format_

    nodes = format_.load(exported[1]).graph.node
    counts = {kind: sum(node.op_type == kind for node in nodes) for kind in ("MatMulNBits", "GatherBlockQuantized")}
    layers = [name for name in onnx.CodedCheckpoint(exported[0]).grids if "word_embeddings" not in name]
    read = [name for name in layers if "pooler" not in name]  # the heads pool by themselves
    assert counts == {"MatMulNBits": len(read), "GatherBlockQuantized": 1}


def test_a_finished_checkpoint_is_exported_whole_or_not_at_all(exported, tmp_path, monkeypatch):
    def fails(*_: Any) -> None:
        raise RuntimeError("off by far")

    monkeypatch.setattr(onnx, "write", lambda source, folder: [])
    monkeypatch.setattr(onnx, "verify", fails)
    with pytest.raises(RuntimeError, match="off by far"):
        epmq.export_checkpoint(exported[0], "onnx", tmp_path / "new", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_off_is_refused(exported, monkeypatch):
    monkeypatch.setattr(onnx, "run_session", lambda *_: dict.fromkeys(("one", "two"), torch.zeros(2, 3)))
    batch = dict(epmq.load(exported[0]).processor(["a b", "c d"], return_tensors="pt"))
    with pytest.raises(RuntimeError, match="onnxruntime is off by"):
        onnx.verify(exported[0], exported[0], [batch])


def test_a_task_that_is_called_like_an_input_is_refused(pool, tmp_path):
    recipe = recipe_for(pool, quantize={"method": "rtn"}, output=str(tmp_path / "out"))
    recipe["experts"][0]["name"] = "input_ids"
    epmq.run(recipe, progress=False, evaluate=False)
    with pytest.raises(ValueError, match="a task is called like an input"):
        epmq.export_checkpoint(tmp_path / "out", "onnx", progress=False)


def test_a_model_of_something_else_is_refused():
    contents = Contents({"architectures": ["WhisperModel"]}, {}, {})
    with pytest.raises(ValueError, match="WhisperModel takes input_features; written are models of input_ids or"):
        onnx.check(contents)
