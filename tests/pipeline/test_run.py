"""A whole run: its report, what decides its bytes, and what its methods come to in special cases."""

import copy
import gc
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import is_quantized, weights
from conftest import perturbed, recipe_for
from greenlet import greenlet
from transformers import BertModel

import epmq
from epmq.data.encoding import encode
from epmq.data.processors import load_processor
from epmq.data.readers import read_examples
from epmq.pipeline.evaluation import evaluate_checkpoint
from epmq.pipeline.run import merge, run
from epmq.quantization.grid import Grid
from epmq.quantization.rtn import round_with, rtn
from epmq.quantization.scales import search_scales
from epmq.reporting.report import TIMED
from tests.kit.quantized import PLAIN_OUTSIDE

QUIET = {"progress": False, "evaluate": False}
# Matrices outside the blocks that are rounded: no head reads the pooler.
OUTSIDE = ("embeddings.word_embeddings", "pooler.dense")


def plain(pool: Path, output: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """The dequantized weights of a run over the pool."""
    recipe = {"format": "dequantized", **fields}
    run(recipe_for(pool, output=str(output), **recipe), **QUIET)
    return weights(output)


def test_the_report_says_what_was_done(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge={"method": "task_arithmetic", "scaling": 0.4})
    report = run(recipe, progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert epmq.load_recipe(report["recipe"]) == epmq.load_recipe(recipe).resolved(True)
    assert report["output"] == recipe["output"]
    assert report["versions"]["torch"] == version("torch")
    assert {"python", "epmq", "transformers", "compressed-tensors"} <= report["versions"].keys()
    assert set(report["seconds"]) == set(report["cpu_seconds"]) == {"open", "merge and quantize", "evaluate"}
    assert all(seconds >= 0 for seconds in report["seconds"].values()) and report["peak_memory_mb"] > 0
    assert report["bytes"] == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert report["notes"] == []

    state = BertModel.from_pretrained(pool / "base").state_dict()
    shapes = {name.removesuffix(".weight"): list(state[name].shape) for name in state if is_quantized(name)}
    outside = {name: list(state[f"{name}.weight"].shape) for name in OUTSIDE}
    assert {layer["name"]: layer["shape"] for layer in report["layers"]} == shapes | outside
    assert all(layer["loss"] is None for layer in report["layers"] if layer["name"] in OUTSIDE)
    solved = [layer for layer in report["layers"] if layer["name"] not in OUTSIDE]
    for layer in solved:
        assert layer["loss"] >= 0 and layer["merge_loss"] >= 0 and layer["seconds"] >= 0
        assert layer["strength"] == report["recipe"]["quantize"]["anchor_strength"]
        assert layer["damping"] == report["recipe"]["quantize"]["damping"] == 0.03
    assert report["loss"] == pytest.approx(sum(layer["loss"] for layer in solved))

    assert report["scores"].keys() == {"one", "two"}
    assert report["mean_score"] == pytest.approx(sum(report["scores"].values()) / 2)
    assert evaluate_checkpoint(tmp_path / "out", recipe, progress=False)["scores"] == report["scores"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "task_arithmetic" in card and "4 bits" in card and f"{100 * report['scores']['one']:.1f} %" in card


def test_every_real_token_is_counted_and_no_padding(pool, tmp_path):
    """The number of tokens is that of the drawn examples, whatever the batch size."""
    expected, tokenizer = 0, load_processor(pool / "base")
    for task in ("one", "two"):
        examples = read_examples(pool / "data" / f"{task}.jsonl").draw(10, 3)
        expected += sum(int(batch["attention_mask"].sum()) for batch in encode(examples, tokenizer, 1, 16))
    losses = []
    for size in (1, 4, 10):
        fields = {"samples": 10, "seed": 3, "batch_size": size, "output": str(tmp_path / str(size))}
        report = run(recipe_for(pool, **fields), **QUIET)
        solved = [layer for layer in report["layers"] if layer["name"] not in OUTSIDE]
        assert {layer["tokens"] for layer in solved} == {expected}
        losses.append([layer["merge_loss"] for layer in solved[:3]])
    # The first input group sees no quantized layer: padding and batch size must not show in it.
    torch.testing.assert_close(torch.tensor(losses[1:]), torch.tensor(losses[:1] * 2), rtol=1e-4, atol=1e-9)


def test_a_run_can_be_repeated_bit_for_bit(pool, tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        recipe = recipe_for(pool, merge={"method": "dare"}, samples=8, output=str(tmp_path / name))
        run(recipe, **QUIET)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert Path("model.safetensors") in files
    for file in files:
        if file.name not in TIMED:
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_seed_decides_the_draw(pool, tmp_path):
    first, second = (plain(pool, tmp_path / str(seed), samples=4, seed=seed, quantize={"bits": 8}) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first if is_quantized(name))
    assert all(torch.equal(first[name], second[name]) for name in first if not is_quantized(name))


@pytest.mark.parametrize("method", ["expert_guided", "rtn", "none"])
def test_the_global_generator_is_left_alone(pool, tmp_path, method):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": method}, merge={"method": "dare"})
    state = torch.get_rng_state()
    run(recipe, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("scales", ["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_rounding_of_the_merge(pool, tmp_path, symmetric, scales):
    merge(recipe_for(pool, output=str(tmp_path / "merged")), progress=False)
    settings, grid = {"bits": 3, "group_size": 32, "symmetric": symmetric}, Grid(3, 32, symmetric)
    settings |= {"method": "rtn", "scales": scales, **PLAIN_OUTSIDE}
    settings["overrides"] = [{"layers": "pooler.dense", "skip": True}]
    rounded, merged = plain(pool, tmp_path / "out", quantize=settings), weights(tmp_path / "merged")
    for name, tensor in merged.items():
        if is_quantized(name):
            parts = search_scales(tensor, grid) if scales == "search" else grid.scales(tensor)
            tensor = round_with(tensor, grid, *parts).dequantize()
        assert torch.equal(rounded[name], tensor), name


def test_rounding_needs_no_calibration_data(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "rtn"})
    for expert in recipe["experts"]:
        del expert["calibration"]
    report = run(recipe, progress=False)
    assert {layer["loss"] for layer in report["layers"]} == {None} and report["scores"]


@pytest.mark.parametrize("copies", [1, 2])
def test_experts_that_are_copies_of_one_model_give_gptq(pool, tmp_path, copies):
    """With nothing to correct, the guided target is the merged one: GPTQ is the special case W_k = W_m."""
    recipe = recipe_for(pool, merge={"method": "average"}, format="dequantized")
    for expert in recipe["experts"]:
        expert["model"] = recipe["experts"][0]["model"]
    recipe["experts"] = recipe["experts"][:copies]
    written = {}
    methods = {
        "gptq": {"damping": 0.02},
        "e_pmq": {"anchor_strength": 0.02},
        "expert_guided": {"anchor_strength": 0.5, "anchor_scale": 1.0, "damping": 0.02},
    }
    for method, more in methods.items():
        settings = {"method": method, "bits": 3, "group_size": 32, **more, **PLAIN_OUTSIDE}
        report = run({**recipe, "quantize": settings, "output": str(tmp_path / method)}, **QUIET)
        written[method] = weights(tmp_path / method)
        assert all((layer["merge_loss"] or 0) < 1e-12 for layer in report["layers"])
    for guided in ("e_pmq", "expert_guided"):
        assert all(torch.equal(written["gptq"][name], tensor) for name, tensor in written[guided].items())
    rounded = {
        name: rtn(tensor, Grid(3, 32)).dequantize()
        for name, tensor in weights(pool / "experts/one").items()
        if is_quantized(name)
    }
    assert any(not torch.equal(written["gptq"][name], tensor) for name, tensor in rounded.items())


def test_a_task_of_no_weight_has_no_say(pool, tmp_path):
    """Task two is replaced by other data and another expert; with weight 0 nothing in the target may change."""
    recipe = recipe_for(pool, merge={"method": "task_arithmetic", "scaling": [0.5, 0.0]}, format="dequantized")
    other = copy.deepcopy(recipe)
    perturbed(BertModel.from_pretrained(pool / "base"), 9).save_pretrained(tmp_path / "other")
    other["experts"][1]["model"] = str(tmp_path / "other")
    results = []
    for i, candidate in enumerate((recipe, other)):
        quantize = {"task_weights": {"one": 1.0, "two": 0.0}, "adapt_heads": False}  # the other has no head
        quantize["overrides"] = [{"layers": "pooler.dense", "skip": True}]  # which may read this
        settings = {"quantize": quantize, "output": str(tmp_path / str(i))}
        run({**candidate, **settings}, **QUIET)
        results.append(weights(tmp_path / str(i)))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_a_strong_anchor_is_rounding_of_the_merge(pool, tmp_path):
    paper = {"method": "e_pmq", "anchor_strength": 1e6, "scales": "minmax"}  # its anchor is in the Hessian too
    strong = plain(pool, tmp_path / "strong", quantize=paper)
    nearest = plain(pool, tmp_path / "nearest", quantize={"method": "rtn", "scales": "minmax"})
    names = [name for name in nearest if is_quantized(name)]
    off = torch.cat([((strong[name] - nearest[name]).abs() / nearest[name].abs().amax()).flatten() for name in names])
    # The scales differ by what is left of the correction; a code differs where a weight lies between two levels.
    assert (off < 1e-4).float().mean() > 0.99


def test_the_output_stands_on_its_own(pool, tmp_path):
    """Everything that answering needs is in the directory, and no path leads out of it."""
    run(recipe_for(pool, output=str(tmp_path / "out")), **QUIET)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    names = sorted(str(path.relative_to(tmp_path / "moved")) for path in (tmp_path / "moved").rglob("*"))
    assert {"config.json", "model.safetensors", "report.json", "README.md", "heads/one.safetensors"} <= set(names)
    assert not any(path.is_symlink() for path in (tmp_path / "moved").rglob("*"))
    assert epmq.load(tmp_path / "moved").answer("two", ["the cat"])[0] in "xyz"


def test_what_cannot_be_scored_is_refused_before_any_compute(pool, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    chat = [{"messages": [{"role": "user", "content": "the cat"}]}]
    with pytest.raises(ValueError, match=r"experts\.one\.evaluation: "):
        run(recipe, evaluation={"one": chat}, progress=False)
    recipe["experts"][0]["evaluation"] = recipe["experts"][1]["evaluation"] = None
    with pytest.raises(ValueError, match="data for 'three', but the recipe has no expert of that name"):
        run(recipe, calibration={"three": chat}, progress=False)
    assert not (tmp_path / "out").exists()


def test_nothing_waits_when_a_run_has_ended(pool, tmp_path, monkeypatch):
    """A greenlet that waits is never collected, and with it a model and its activations."""

    def waiting() -> int:
        gc.collect()
        return sum(type(thing) is greenlet and bool(thing) for thing in gc.get_objects())

    before = waiting()
    run(recipe_for(pool, output=str(tmp_path / "one")), progress=False, evaluate=False)
    assert waiting() == before
    with monkeypatch.context() as patch:
        patch.setattr("epmq.quantization.stacked.rtn_fallback", None)  # the first layer that is solved fails
        with pytest.raises(TypeError):
            run(recipe_for(pool, output=str(tmp_path / "two")), progress=False, evaluate=False)
    assert waiting() == before
