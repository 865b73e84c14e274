from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from conftest import recipe_for
from odd_families import image_text_batch, llava, prepared_run, switch, token_batch
from transformers.modeling_outputs import BaseModelOutput

from epmq.calibration.calls import BlockCalls
from epmq.calibration.engine import LayerReport
from epmq.calibration.sequential import Batch
from epmq.models.blocks import linears
from epmq.pipeline.prepare import PreparedRun, prepare
from epmq.pipeline.run import calibration_batches, calibration_engine
from epmq.quantization.grid import QuantizedTensor
from epmq.recipe_file import load_recipe
from tests.kit.quantized import PLAIN_OUTSIDE


def quantized(recipe: dict[str, Any]) -> tuple[PreparedRun, list[Batch], list[LayerReport], dict[str, Any]]:
    """Quantize a recipe's merge in memory: the live model stays, with reports and all tensors by their names."""
    return in_memory(prepare(load_recipe(recipe)))


def in_memory(prepared: PreparedRun) -> tuple[PreparedRun, list[Batch], list[LayerReport], dict[str, Any]]:
    """As `quantized`, of a run that has been checked."""
    batches, reports, tensors = calibration_batches(prepared), list[LayerReport](), dict[str, Any]()
    engine = calibration_engine(prepared, batches)
    engine.keep = True
    for block in engine:
        reports += block.reports
        for name, tensor in [
            *((f"{name}.weight", weight) for name, weight in block.layers.items()),
            *block.tensors.items(),
        ]:
            assert name not in tensors
            tensors[name] = tensor
    return prepared, batches, reports, tensors


def record_inputs(model: Any, layers: dict[str, Any], batches: list[Batch], inputs: dict[str, Any]) -> None:
    """What the layers see in the finished model: every layer before them is quantized."""
    for batch in batches:
        mask = batch.inputs["attention_mask"].bool()

        def note(name, task=batch.task, mask=mask):
            return lambda module, args: inputs[name].setdefault(task, []).append(args[0][mask].double())

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(note(name)))
            model(**batch.inputs)


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "e_pmq"])
def test_reported_losses_are_those_of_the_finished_model(pool, method):
    """Recompute every layer's (W*, H) from the definition, on the inputs that it has in the finished model."""
    settings = {"method": method, "bits": 3, "group_size": 32, "symmetric": False}
    prepared, batches, reports, _ = quantized(recipe_for(pool, quantize=settings))
    experts, model = prepared.experts, prepared.experts.model
    reported = {report.name: report for report in reports}
    layers = {name: layer for name, layer in linears(model) if name in reported}
    assert len(reports) == len(reported) == 12

    inputs: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in layers}
    record_inputs(model, layers, batches, inputs)

    for name, layer in layers.items():
        merged = prepared.merged.tensor(f"{name}.weight").double()
        hessian, correction = torch.zeros(merged.shape[1], merged.shape[1]).double(), torch.zeros_like(merged)
        for task, expert in experts.experts.items():
            rows = torch.cat(inputs[name][task])
            gram = rows.T @ rows / len(rows) / len(experts.experts)
            hessian = hessian + gram
            if method == "e_pmq":
                weight = expert.tensor(f"{name}.weight").double()
                bias = expert.tensor(f"{name}.bias").double() - layer.bias.double()
                mean = rows.mean(0) / len(experts.experts)
                correction = correction + (weight - merged) @ gram + torch.outer(bias, mean)
        strength = 0.03 if method == "e_pmq" else 0.01
        hessian = hessian + strength * hessian.diagonal().mean() * torch.eye(len(hessian))
        target = merged + correction @ torch.linalg.inv(hessian)
        delta = layer.weight.double() - target
        trace = float(torch.trace(delta @ hessian @ delta.T))
        assert reported[name].loss == pytest.approx(trace, rel=1e-3), name
        off = merged - target
        assert reported[name].merge_loss == pytest.approx(float(torch.trace(off @ hessian @ off.T)), rel=1e-2, abs=1e-9)
        assert reported[name].tokens == sum(len(torch.cat(rows)) for rows in inputs[name].values())


@torch.no_grad()
def test_live_weights_are_the_yielded_codes_and_nothing_is_left_out(pool):
    settings = {"method": "expert_guided", "bits": 2, "group_size": 32}
    prepared, _, _, tensors = quantized(recipe_for(pool, quantize=settings))
    experts = prepared.experts
    assert set(tensors) == set(experts.names) - set(experts.outside_names())
    for name, layer in linears(experts.model.encoder):
        weight = tensors[f"encoder.{name}.weight"]
        assert torch.equal(layer.weight, weight.dequantize())
        assert weight.codes.min() >= -2 and weight.codes.max() <= 1


@torch.no_grad()
def test_experts_that_are_copies_of_the_merge_give_gptq(pool):
    """The identity on a whole model: one expert, averaged, is the merge itself."""
    recipe = recipe_for(pool, merge={"method": "average"})
    recipe["experts"] = [{**recipe["experts"][0], "name": name} for name in ("one", "two")]
    results = []
    paper = {"method": "e_pmq", "anchor_strength": 0.01}
    ours = {"method": "expert_guided", "anchor_strength": 0.5, "anchor_scale": 1, "damping": 0.01}
    for settings in ({"method": "gptq"}, paper, ours):
        tensors = quantized({**recipe, "quantize": {**settings, **PLAIN_OUTSIDE}})[3]
        results.append({name: weight for name, weight in tensors.items() if isinstance(weight, QuantizedTensor)})
    plain, *guided = results
    for weights in guided:
        assert plain.keys() == weights.keys() and len(plain) == 12
        for name, weight in plain.items():
            assert torch.equal(weight.codes, weights[name].codes) and torch.equal(weight.scale, weights[name].scale)


@torch.no_grad()
@pytest.mark.parametrize("features", [0.0, 0.6])
def test_a_weak_anchor_and_a_fine_grid_bring_the_experts_stream_back(pool, features):
    """One expert, merged by a third: even what the embeddings got wrong is undone where layers aim at its stream."""
    recipe = recipe_for(pool, merge={"method": "task_arithmetic", "scaling": 0.3})
    recipe["experts"] = recipe["experts"][:1]
    off = {}
    for stream in (False, True):
        settings = {"method": "expert_guided", "bits": 8, "group_size": 32, "anchor_strength": 1e-3}
        settings |= {"expert_features": features, "expert_stream": stream}
        prepared, batches, _, _ = quantized({**recipe, "quantize": settings})
        experts = prepared.experts
        expert = experts.whole_model(experts.experts["one"], torch.device("cpu"))
        inputs = [batch.inputs for batch in batches]
        errors = [experts.model(**one).last_hidden_state - expert(**one).last_hidden_state for one in inputs]
        real = [one["attention_mask"].bool() for one in inputs]
        off[stream] = sum(float(rows[mask].square().sum()) for rows, mask in zip(errors, real))
    assert off[True] < 0.01 * off[False]


def tokens_seen(prepared: PreparedRun, batches: list[Batch], names: set[str]) -> dict[str, int]:
    """How many rows of inputs reach each layer of the live model in one forward a batch."""
    seen = dict.fromkeys(names, 0)

    def note(name: str, module: Any, args: Any) -> None:
        seen[name] += args[0].shape[:-1].numel()

    model = prepared.experts.model
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(note, name)))
        for batch in batches:
            model(**batch.inputs)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("method, order", [("gptq", (0, 1, 2)), ("gptq", (2, 0, 1)), ("expert_guided", (1, 2, 0))])
def test_layers_of_a_mixture_are_calibrated_on_whatever_tokens_reach_them(tmp_path, method, order):
    """Some batches are of one token alone, which only some layers see, and one layer may see none."""
    ids = [token_batch(1)["input_ids"], torch.full((2, 8), 7), torch.full((2, 8), 9)]
    batches = [{"input_ids": ids[i], "decoder_input_ids": ids[i]} for i in order]
    prepared = prepared_run(tmp_path, switch, {"one": batches[:2], "two": batches[2:]}, method)
    notes = prepared.experts.notes
    _, _, reports, _ = in_memory(prepared)
    reported = {report.name: report.tokens for report in reports}
    assert reported == tokens_seen(prepared, calibration_batches(prepared), set(reported))
    idle = [name for name, tokens in reported.items() if not tokens]
    assert all(any(name.split(".experts.")[1] in note for note in notes.departures) for name in idle)
    assert any(note.startswith("values decide which tokens reach") for note in notes) == (method == "expert_guided")


@torch.no_grad()
@pytest.mark.parametrize("method", ["e_pmq", "expert_guided"])
def test_batches_need_not_call_the_same_blocks(tmp_path, method):
    calibration = {"one": [token_batch(1), image_text_batch(2)], "two": [token_batch(3)]}
    tower = {"layers": "*vision_tower*", "bits": 8}
    prepared = prepared_run(tmp_path, llava, calibration, method, overrides=[tower])
    _, batches, reports, _ = in_memory(prepared)
    reported = {report.name: report.tokens for report in reports}
    assert set(reported.values()) == {3 * 3 * 8, 3 * 5} and len(reported) == 2 * 6 + 2 * 7 + 1  # the output layer
    assert reported == tokens_seen(prepared, batches, set(reported))
    assert "model.vision_tower.encoder.layers is not calibrated on two" in " ".join(prepared.experts.notes)


@torch.no_grad()
@pytest.mark.parametrize("pictures", [True, False])
def test_experts_go_past_blocks_in_which_nothing_is_solved(tmp_path, pictures):
    """A tower beside the language model is not quantized by default; then it needs no data either."""
    batches = [token_batch(1), *([image_text_batch(2)] if pictures else [])]
    prepared = prepared_run(tmp_path, llava, {"one": batches, "two": [token_batch(3)]}, "expert_guided")
    _, _, reports, tensors = in_memory(prepared)
    assert len(reports) == 2 * 7 + 1 and all(".language_model." in report.name for report in reports[:-1])
    assert {report.tokens for report in reports} == {2 * 24 + 24 * pictures}
    tower = [name for name in prepared.experts.names if ".vision_tower.encoder." in name]
    assert all(torch.equal(tensors[name].float(), prepared.merged.tensor(name).half().float()) for name in tower)
    assert not prepared.experts.notes.departures


@torch.no_grad()
def test_blocks_that_no_batch_calls_are_rounded(pool):
    prepared = prepare(load_recipe(recipe_for(pool, quantize={"method": "gptq"})))
    encoder, left = prepared.experts.model.encoder, "encoder.layer.1"
    encoder.forward = lambda hidden, *args, **kwargs: BaseModelOutput(encoder.layer[0](hidden, *args, **kwargs))
    prepared.calls = BlockCalls(("encoder.layer.0",))
    _, _, reports, tensors = in_memory(prepared)
    assert f"no calibration data reaches {left}: it is rounded to nearest" in prepared.experts.notes.departures
    rounded = [report for report in reports if report.name.startswith(left)]
    assert len(rounded) == 6 and all(report.loss is None and report.tokens == 0 for report in rounded)
    assert set(tensors) == set(prepared.experts.names) - set(prepared.experts.outside_names())
