"""Tied and untied output layers, in base, experts and both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config, weights
from conftest import perturbed
from families import FAMILIES
from merges import QUIET, open_folder, recipe_of, set_weights
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

import epmq
from epmq.merging.ties import asked_fields, follow_ties
from epmq.pipeline.run import merge, run
from tests.kit.quantized import PLAIN_OUTSIDE

BE_THE_EXPERT = {"merge": {"method": "task_arithmetic", "scaling": 1.0}, "quantize": {"method": "none"}}
IDS = {"input_ids": torch.arange(1, 13)[None]}
NOTE = "lm_head.weight is model.embed_tokens.weight in {}, another in {}: they are two"


def save(folder: Path, tied: bool, seed: int = 0) -> None:
    """A Llama, with the same weights for every seed but for what fine-tuning moved."""
    torch.manual_seed(0)
    model = FAMILIES["smollm2" if tied else "llama"].build()
    (perturbed(model, seed) if seed else model).save_pretrained(folder)


def is_the_expert(folder: Path, model_class: Any = AutoModelForCausalLM, inputs: dict[str, Any] = IDS) -> Any:
    """Merge the one expert at scaling 1; its logits must come out. Returns the report."""
    report = merge(recipe_of(folder, "one", **BE_THE_EXPERT), progress=False)
    with torch.no_grad():
        found, wanted = (model_class.from_pretrained(folder / name)(**inputs).logits for name in ("out", "one"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    return report


@pytest.mark.parametrize("says", ["its config", "its file"])
@pytest.mark.parametrize("base_tied", [True, False])
def test_where_base_and_expert_disagree_the_output_is_untied(tmp_path, base_tied, says):
    save(tmp_path / "base", base_tied)
    save(tmp_path / "one", not base_tied, 1)
    untied = tmp_path / ("one" if base_tied else "base")
    if says == "its file":
        edit_config(untied, tie_word_embeddings=True)
    report = is_the_expert(tmp_path)
    whose = ("the base", "expert one") if base_tied else ("expert one", "the base")
    assert NOTE.format(*whose) in report["notes"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.config.tie_word_embeddings is False and "lm_head.weight" in weights(tmp_path / "out")


def test_where_they_agree_nothing_changes(tmp_path):
    for tied in (True, False):
        save(tmp_path / "base", tied)
        save(tmp_path / "one", tied, 1)
        report = is_the_expert(tmp_path)
        assert not [note for note in report["notes"] if "they are two" in note]
        assert ("lm_head.weight" in weights(tmp_path / "out")) is not tied
        (tmp_path / "out").rename(tmp_path / f"out_{tied}")


def test_a_quantized_output_is_untied_too(tmp_path):
    save(tmp_path / "base", tied=True)
    save(tmp_path / "one", tied=False, seed=1)
    save(tmp_path / "two", tied=True, seed=2)
    expected = [weights(tmp_path / name).get("lm_head.weight") for name in ("one", "two")]
    base, two = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("base", "two"))
    assert expected[1] is None
    lm_head = base + 0.5 * (expected[0] - base + two - base)
    recipe = recipe_of(
        tmp_path, merge={"method": "task_arithmetic", "scaling": 0.5}, quantize={"method": "gptq", **PLAIN_OUTSIDE}
    )
    run(recipe, calibration={name: [IDS] for name in ("one", "two")}, **QUIET)
    torch.testing.assert_close(epmq.load(tmp_path / "out").backbone.lm_head.weight, lm_head, rtol=0, atol=1e-6)


def test_an_output_layer_that_nothing_gives_is_an_error(tmp_path):
    save(tmp_path / "base", tied=False)
    save(tmp_path / "one", tied=False, seed=1)
    set_weights(tmp_path / "one", lm_head__weight=None)
    with pytest.raises(ValueError, match=r"expert one: no tensor for 'lm_head\.weight', which its config does not tie"):
        open_folder(tmp_path, "one")
    set_weights(tmp_path / "base", lm_head__weight=None)
    with pytest.raises(ValueError, match=r"base: no tensor for 'lm_head\.weight', which its config\.json does not tie"):
        open_folder(tmp_path, "one")


def test_a_part_of_what_is_tied_may_come_apart(t5s):
    """The encoder's and the decoder's embeddings stay one; the config cannot say that, and the file does."""
    set_weights(t5s / "one", lm_head__weight=torch.randn(32, 32))
    report = is_the_expert(t5s, T5ForConditionalGeneration, {**IDS, "decoder_input_ids": IDS["input_ids"][:, :4]})
    assert "lm_head.weight is shared.weight in the base, another in expert one: they are two" in report["notes"]
    assert {"lm_head.weight", "shared.weight"} <= weights(t5s / "out").keys()
    assert "encoder.embed_tokens.weight" not in weights(t5s / "out")


def test_an_expert_that_computes_otherwise_is_refused(t5s):
    edit_config(t5s / "one", tie_word_embeddings=False, scale_decoder_outputs=False)
    with pytest.raises(ValueError, match=r"expert one: scale_decoder_outputs is False \(True in the base\)"):
        open_folder(t5s, "one")


def test_what_a_forward_asks_of_ties():
    assert asked_fields(FAMILIES["t5"].build()) == ["scale_decoder_outputs"]
    assert asked_fields(FAMILIES["smollm2"].build()) == asked_fields(FAMILIES["bart"].build()) == []


def test_tied_names_stand_for_what_the_file_has():
    tied = {"b": "a", "c": "a", "e": "d"}
    stored = {"c": "on disk"}
    follow_ties(stored, tied)
    assert stored == {"a": "on disk", "b": "on disk", "c": "on disk"}
    stored = {"a": "one", "c": "another"}
    follow_ties(stored, tied)
    assert stored == {"a": "one", "b": "one", "c": "another"}
