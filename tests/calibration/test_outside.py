"""The linear layers after the last block."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapt
from checkpoints import weights
from conftest import padded_batches, recipe_for
from families import FAMILIES
from odd_families import albert, prepared_run, saved_recipe, token_batch
from transformers import AutoModelForCausalLM

import epmq
from epmq.calibration import offload
from epmq.calibration.engine import LayerReport
from epmq.calibration.outside import unread_modules
from epmq.models.heads import HEAD_FILE
from epmq.pipeline.journal import Journal
from epmq.pipeline.prepare import PreparedRun, prepare
from epmq.pipeline.run import calibration_batches, calibration_engine, run
from epmq.quantization.factor import factorize
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid
from epmq.recipe_file import load_recipe
from tests.kit.quantized import PLAIN_OUTSIDE

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


def calibration() -> dict[str, Any]:
    """Padded texts of two tasks."""
    return {"one": padded_batches(2), "two": padded_batches(3)[2:]}


def solved(prepared: PreparedRun) -> tuple[Any, dict[str, LayerReport]]:
    """The last step of a calibration, and its reports by name; the live model stays."""
    engine = calibration_engine(prepared, calibration_batches(prepared))
    engine.keep = True
    block = list(engine)[-1]
    if "lm_head" in block.layers:  # of the live model nothing reads it any more
        prepared.experts.model.lm_head.weight.data = block.layers["lm_head"].dequantize()
    return block, {report.name: report for report in block.reports}


@torch.no_grad()
def test_an_output_layer_is_gptq_on_what_it_reads_without_padding(tmp_path):
    prepared = prepared_run(tmp_path, FAMILIES["llama"].build, calibration(), "gptq")
    block, reports = solved(prepared)
    model = prepared.experts.model
    hessian, tokens = torch.zeros(64, 64), 0
    for batches in calibration().values():
        rows = []
        for batch in batches:
            hidden = model.model(**batch).last_hidden_state
            rows.append(hidden[batch["attention_mask"].bool()])
        x = torch.cat(rows)
        hessian, tokens = hessian + x.T @ x / len(x) / 2, tokens + len(x)
    assert block.name == "" and reports.keys() == {"lm_head"} and reports["lm_head"].tokens == tokens
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64)
    merged, found = prepared.merged.tensor("lm_head.weight"), block.layers["lm_head"]
    codes, loss = gptq(merged, factorize(hessian), Grid(8), search=True, scale_dtype=torch.float16)
    assert (codes.codes != found.codes).float().mean() < 0.01
    assert reports["lm_head"].loss == pytest.approx(float(loss.sum()), rel=0.02)


@torch.no_grad()
def test_one_expert_alone_gives_its_own_output_layer(tmp_path):
    """Its scores are what the layer aims at: with inputs that are the expert's own it is the expert's."""
    fields = saved_recipe(tmp_path, FAMILIES["llama"].build, "expert_guided")
    fields["experts"] = fields["experts"][:1]
    fields |= {"merge": {"method": "task_arithmetic", "scaling": 1.0}}
    fields["quantize"] |= {"bits": 16, "anchor_scale": 1.0}
    prepared = prepare(load_recipe(fields), evaluate=False, calibration={"one": padded_batches(2)})
    block, _ = solved(prepared)
    own = weights(tmp_path / "one")["lm_head.weight"]
    kept = block.tensors.get("lm_head.weight")
    torch.testing.assert_close(prepared.experts.model.lm_head.weight, own, rtol=0, atol=1e-5)
    assert kept is None or torch.allclose(kept, own, atol=1e-5)


@torch.no_grad()
def test_an_output_layer_aims_at_the_scores_of_its_expert(tmp_path):
    """With a third of the task vector and a weak anchor, scores come back that the merged layer does not give."""
    off = {}
    for layer in (16, {"bits": 8}):
        folder = tmp_path / str(layer == 16)
        fields = saved_recipe(folder, FAMILIES["llama"].build, "expert_guided")
        fields["experts"] = fields["experts"][:1]
        fields |= {"merge": {"method": "task_arithmetic", "scaling": 0.3}}
        fields["quantize"] |= {"output_layer": layer, "anchor_strength": 1e-3}
        prepared = prepare(load_recipe(fields), evaluate=False, calibration={"one": padded_batches(2)})
        assert prepared.layout.output_layer == (None if layer == 16 else "lm_head")
        solved(prepared)
        expert = AutoModelForCausalLM.from_pretrained(folder / "one").eval()
        real = [batch["attention_mask"].bool() for batch in padded_batches(2)]
        scores = [(prepared.experts.model(**b).logits - expert(**b).logits)[m] for b, m in zip(padded_batches(2), real)]
        off[layer == 16] = float(torch.cat(scores).square().mean())
    assert off[False] < 0.5 * off[True]


def test_what_a_block_reads_is_not_late(tmp_path):
    # The texts' blocks come after the pictures' projection, but do not read it; ALBERT's blocks read the mapping.
    clip, texts = FAMILIES["clip"], {"one": [token_batch(1)], "two": [token_batch(2)]}
    prepared = prepared_run(tmp_path / "clip", clip.build, {"one": clip.batches(), "two": clip.batches()}, "gptq")
    assert set(prepared.layout.late) == {"text_projection", "visual_projection"}
    prepared = prepared_run(tmp_path / "albert", albert, texts, "gptq")
    assert prepared.layout.late == ("pooler",)
    assert prepared.layout.grid("encoder.embedding_hidden_mapping_in") is not None


def test_modules_that_no_head_reads_are_found(own_pool):
    fields = recipe_for(own_pool, quantize={"method": "gptq"})
    prepared = prepare(load_recipe(fields), evaluate=False)
    late = prepared.calls.late
    assert unread_modules(prepared.experts, prepared.calibration, late) == ["pooler.dense"] == list(late)
    assert prepared.layout.late == ()
    (own_pool / "experts" / "two" / HEAD_FILE).unlink()
    prepared = prepare(load_recipe(fields), evaluate=False)
    assert unread_modules(prepared.experts, prepared.calibration, late) == []  # whoever takes the model may read it
    assert prepared.layout.late == ("pooler.dense",)


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> dict[str, Any]:
    """A recipe over language models, of which one expert is an adapter."""
    folder = tmp_path_factory.mktemp("language")
    fields = saved_recipe(folder, FAMILIES["llama"].build, "expert_guided", format="pack-quantized")
    shutil.rmtree(folder / "two")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapt(base, folder / "two", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    run({**fields, "output": str(folder / "whole")}, calibration=calibration(), **QUIET)
    return fields


@pytest.mark.parametrize("entries", [0, 1, 2, 3])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(language, tmp_path, monkeypatch, entries):
    """Before what lies outside, before the blocks, within them, and before the last step; activations lie on a disk."""
    append, fields = Journal.append, {**language, "output": str(tmp_path / "out"), "activations": "disk"}
    monkeypatch.setattr(offload, "SMALLEST", 1)

    def stop(journal: Journal, name: str, reports: list[dict[str, Any]]) -> None:
        if len(journal) == entries:
            raise KeyboardInterrupt
        append(journal, name, reports)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", stop)
        run(fields, calibration=calibration(), **QUIET)
    report = run(fields, calibration=calibration(), **QUIET)
    resumed = f"{entries - 1} of 3 blocks were finished by a run that was stopped"
    assert (resumed in report["notes"]) == (entries > 1)
    folders = tmp_path / "out", Path(language["base"]).parent / "whole"
    files = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]


@torch.no_grad()
def test_plain_outside_is_the_merge(tmp_path):
    fields = saved_recipe(tmp_path, FAMILIES["llama"].build, "gptq")
    fields["quantize"] |= PLAIN_OUTSIDE
    run({**fields, "output": str(tmp_path / "out")}, calibration=calibration(), **QUIET)
    epmq.merge({**fields, "output": str(tmp_path / "merged")}, progress=False)
    stored = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "merged").items():
        assert torch.equal(stored[name], tensor) == (not name.endswith("_proj.weight")), name
