"""Models that call their blocks again and again."""

from typing import Any

import pytest
import torch
from conftest import perturbed
from odd_families import albert, albert_config, prepared_run, saved_recipe, token_batch
from transformers import AlbertForSequenceClassification

import epmq
from epmq.calibration.calls import BlockCalls
from epmq.calibration.engine import CalibrationEngine
from epmq.calibration.repeated import RepeatedCalibrator, calibrator_of
from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.models.blocks import linears
from epmq.pipeline.run import calibration_batches, calibration_engine, run
from tests.kit.quantized import PLAIN_OUTSIDE

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
GROUPS = tuple(f"encoder.albert_layer_groups.{index}" for index in range(2))


def padded(seed: int) -> dict[str, torch.Tensor]:
    batch = token_batch(seed)
    batch["attention_mask"][0, 5:] = 0
    return batch


def calibration() -> dict[str, Any]:
    return {"one": [padded(1), token_batch(2)], "two": [padded(3)]}


def test_a_model_is_gone_through_as_it_calls_its_blocks():
    model, batches = albert(), [Batch("", 0, token_batch(1))]
    assert type(calibrator_of(model, batches, BlockCalls(GROUPS))) is SequentialCalibrator
    calibrator = calibrator_of(model, batches, BlockCalls(GROUPS, GROUPS))
    assert isinstance(calibrator, RepeatedCalibrator)
    calls: list[Any] = []
    for step in calibrator:
        with step.block.register_forward_hook(lambda *_: calls.append(1)):
            step.run(0)
    with torch.no_grad():
        expected = model(**batches[0].inputs).last_hidden_state
    assert len(calls) == 4 and torch.equal(calibrator.first_output, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "e_pmq", "expert_guided"])
def test_layers_are_calibrated_on_all_calls(tmp_path, method):
    prepared = prepared_run(tmp_path, albert, calibration(), method)
    engine = calibration_engine(prepared, calibration_batches(prepared))
    engine.keep = True
    reports = [report for block in engine for report in block.reports]
    tokens = {report.name: report.tokens for report in reports}
    assert tokens.pop("pooler") == 9 and len(tokens) == 12 and set(tokens.values()) == {2 * (3 * 24 - 2 * 3)}
    for name, layer in linears(prepared.experts.model) if method == "gptq" else ():
        if ".albert_layers." in name:
            merged = prepared.merged.tensor(f"{name}.weight")
            assert (layer.weight - merged).norm() < 0.02 * merged.norm()


def test_the_first_layer_has_the_moments_of_every_pass(tmp_path, monkeypatch):
    """With two passes of one group they are those of both: the second pass reads what the first gives."""
    plain = {**PLAIN_OUTSIDE, "overrides": [{"layers": "encoder.embedding_hidden_mapping_in", "skip": True}]}
    prepared = prepared_run(tmp_path, lambda: albert(2, 1), calibration(), "gptq", **plain)
    hessians, solve = [], CalibrationEngine._solve
    monkeypatch.setattr(
        CalibrationEngine,
        "_solve",
        lambda self, step, group, block: (hessians.append(group.objective.hessian), solve(self, step, group, block)),
    )
    list(calibration_engine(prepared, calibration_batches(prepared)))
    model = prepared.experts.whole_model(prepared.merged, torch.device("cpu"))
    query, expected = model.get_submodule(f"{GROUPS[0]}.albert_layers.0.attention.query"), 0.0
    for batches in calibration().values():
        rows: list[torch.Tensor] = []
        for batch in batches:
            real = batch["attention_mask"].bool()
            with (
                torch.no_grad(),
                query.register_forward_pre_hook(lambda module, args, real=real, rows=rows: rows.append(args[0][real])),
            ):
                model(**batch)
        x = torch.cat(rows)
        expected = expected + x.T @ x / len(x) / 2
    torch.testing.assert_close(hessians[0], expected)


def test_a_run_with_heads_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    recipe = saved_recipe(tmp_path, albert, "expert_guided")
    for seed, expert in enumerate(recipe["experts"]):
        torch.manual_seed(seed)
        model = AlbertForSequenceClassification(albert_config(num_labels=3))
        model.albert.load_state_dict(perturbed(albert(), seed + 1).state_dict())
        model.save_pretrained(expert["model"])
    report = run({**recipe, "output": str(tmp_path / "whole")}, calibration=calibration(), **QUIET)
    model = epmq.load(tmp_path / "whole")
    for task, batches in calibration().items():
        expert = AlbertForSequenceClassification.from_pretrained(tmp_path / task).eval()
        with torch.no_grad():
            off = [(model(task, **batch) - expert(**batch).logits).square().mean() for batch in batches]
        assert float(max(off)) < report["heads"][task]["before"]

    solve, solved = CalibrationEngine._quantize, []

    def stop_at_the_second(self: Any, step: Any) -> Any:
        if solved:
            raise KeyboardInterrupt
        solved.append(step.name)
        return solve(self, step)

    stopped = {**recipe, "output": str(tmp_path / "stopped")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CalibrationEngine, "_quantize", stop_at_the_second)
        run(stopped, calibration=calibration(), **QUIET)
    run(stopped, calibration=calibration(), **QUIET)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
