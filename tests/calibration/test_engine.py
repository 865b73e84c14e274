from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_for

from epmq.calibration.engine import Calibration, load_outside, quantize_calibrated
from epmq.data.encoding import encode
from epmq.merging.experts import Sources
from epmq.models.blocks import linears
from epmq.models.hooks import pre_hooks
from epmq.pipeline.run import prepare
from epmq.recipe_file import load_recipe


def quantized(pool: Path, **settings: Any) -> tuple[Sources, list[Calibration], list[Any], dict[str, Any]]:
    """Quantize the pool's merge in memory: sources with the live model, calibration, reports and codes."""
    from epmq.data.encoding import encode

    job = prepare(load_recipe(recipe_for(pool, quantize=settings)))
    calibration = [Calibration(task, list(encode(x, job.processor, 8, 16))) for task, x in job.calibration.items()]
    codes: dict[str, Any] = {}

    def emit(name: str, tensor: torch.Tensor) -> None:
        assert name not in codes
        codes[name] = tensor

    load_outside(job.sources, torch.device("cpu"))
    steps = quantize_calibrated(
        job.sources,
        calibration,
        emit,
        lambda name, layer, weight: emit(f"{name}.weight", weight),
        torch.device("cpu"),
        keep=True,
    )
    return job.sources, calibration, [report for step in steps for report in step], codes


def record_inputs(model, layers, calibration, inputs) -> None:
    """What the layers see in the finished model: every layer before them is quantized."""
    for part in calibration:
        for batch in part.batches:
            mask = batch["attention_mask"].bool()

            def note(name, task=part.task, mask=mask):
                return lambda module, args: inputs[name].setdefault(task, []).append(args[0][mask].double())

            with pre_hooks([(layer, note(name)) for name, layer in layers.items()]):
                model(**batch)


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "e_pmq"])
def test_reported_losses_are_those_of_the_finished_model(pool, method):
    """Recompute every layer's (W*, H) from the definition, on the inputs that it has in the finished model."""
    sources, calibration, reports, _ = quantized(pool, method=method, bits=3, group_size=32, symmetric=False)
    model = sources.model
    reported = {report.name: report for report in reports}
    layers = {name: layer for name, layer in linears(model) if name in reported}
    assert len(reports) == len(reported) == 12

    inputs: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in layers}
    record_inputs(model, layers, calibration, inputs)

    for name, layer in layers.items():
        merged = sources.merged(f"{name}.weight").double()
        hessian, correction = torch.zeros(merged.shape[1], merged.shape[1]).double(), torch.zeros_like(merged)
        for part in calibration:
            rows = torch.cat(inputs[name][part.task])
            gram = rows.T @ rows / len(rows) / len(calibration)
            hessian = hessian + gram
            if method == "e_pmq":
                expert = sources.expert_tensor(part.task, f"{name}.weight").double()
                bias = sources.expert_tensor(part.task, f"{name}.bias").double() - layer.bias.double()
                correction = correction + (expert - merged) @ gram + torch.outer(bias, rows.mean(0)) / len(calibration)
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
def test_live_weights_are_the_emitted_codes_and_nothing_is_left_out(pool):
    sources, _, _, emitted = quantized(pool, method="expert_guided", bits=2, group_size=32)
    assert set(emitted) == set(sources.names) - set(sources.outside_names())
    for name, layer in linears(sources.model.encoder):
        weight = emitted[f"encoder.{name}.weight"]
        assert torch.equal(layer.weight, weight.dequantize())
        assert weight.codes.min() >= -2 and weight.codes.max() <= 1


@torch.no_grad()
def test_experts_that_are_copies_of_the_merge_give_gptq(pool):
    """The identity on a whole model: one expert, averaged, is the merge itself."""
    recipe = recipe_for(pool, merge={"method": "average"})
    recipe["experts"] = [{**recipe["experts"][0], "name": name} for name in ("one", "two")]
    found = []
    paper = {"method": "e_pmq", "anchor_strength": 0.01}
    ours = {"method": "expert_guided", "anchor_strength": 0.5, "anchor_scale": 1, "damping": 0.01}
    for settings in ({"method": "gptq"}, paper, ours):
        job = prepare(load_recipe({**recipe, "quantize": settings}))
        calibration = [Calibration(task, list(encode(x, job.processor, 8, 16))) for task, x in job.calibration.items()]
        codes: dict[str, Any] = {}
        load_outside(job.sources, torch.device("cpu"))
        keep = codes.__setitem__
        for _ in quantize_calibrated(
            job.sources, calibration, lambda *a: None, lambda n, _, w, keep=keep: keep(n, w), torch.device("cpu")
        ):
            pass
        found.append(codes)
    plain, *guided = found
    for codes in guided:
        assert plain.keys() == codes.keys() and len(plain) == 12
        for name, weight in plain.items():
            assert torch.equal(weight.codes, codes[name].codes) and torch.equal(weight.scale, codes[name].scale)


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
        job = prepare(load_recipe({**recipe, "quantize": settings}))
        batches = list(encode(job.calibration["one"], job.processor, 8, 16))
        load_outside(job.sources, torch.device("cpu"))
        for _ in quantize_calibrated(
            job.sources, [Calibration("one", batches)], lambda *a: None, lambda *a: None, torch.device("cpu"), keep=True
        ):
            pass
        expert = job.sources.whole_model("one", torch.device("cpu"))
        moved = [(job.sources.model(**b).last_hidden_state - expert(**b).last_hidden_state) for b in batches]
        real = [batch["attention_mask"].bool() for batch in batches]
        off[stream] = sum(float(rows[mask].square().sum()) for rows, mask in zip(moved, real))
    assert off[True] < 0.01 * off[False]
