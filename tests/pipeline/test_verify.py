"""A checkpoint that is not what was quantized is noticed before it appears."""

import os

import pytest
import torch
from conftest import recipe_for

from epmq.export import dequantized, packed
from epmq.pipeline import run as pipeline
from epmq.pipeline import verify
from epmq.pipeline.run import run


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq", "read back, it gives other outputs than the model in memory"),
        ("rtn", r"read back, encoder\.layer\.1\.output\.dense is not what was quantized"),
    ],
)
@pytest.mark.parametrize("form", [packed, dequantized])
def test_a_checkpoint_that_reads_otherwise_is_not_published(pool, tmp_path, monkeypatch, form, method, message):
    """One layer is written with its rows turned round."""
    tensors = form.tensors

    def turned(layer, weight, transposed):
        right = tensors(layer, weight, transposed)
        if layer.endswith("layer.1.output.dense"):
            return {name: t.flip(0) if t.ndim == 2 else t for name, t in right.items()}
        return right

    name = form.__name__.rpartition(".")[2].replace("packed", "pack-quantized")
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": method}, format=name)
    with monkeypatch.context() as patch:
        patch.setattr(form, "tensors", turned)
        with pytest.raises(RuntimeError, match=message):
            run(recipe, progress=False, evaluate=False)
    assert os.listdir(tmp_path) == []  # what is wrong is not gone on from
    report = run(recipe, progress=False, evaluate=False)
    assert not any("was stopped" in note for note in report["notes"])


def test_a_tensor_outside_the_blocks_is_noticed_too(pool, tmp_path, monkeypatch):
    writer = pipeline.CheckpointWriter

    class Wrong(writer):  # type: ignore[misc, valid-type]
        def write(self, name, parts):
            if name == "embeddings.position_embeddings.weight":
                parts = (2 * part for part in parts)
            super().write(name, parts)

    monkeypatch.setattr(pipeline, "CheckpointWriter", Wrong)
    with pytest.raises(RuntimeError, match="read back"):
        run(recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "gptq"}), progress=False, evaluate=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("settings", [{"method": "gptq", "bits": 3, "group_size": 32, "symmetric": False}, {}])
@pytest.mark.parametrize("form", ["pack-quantized", "dequantized"])
def test_what_is_written_gives_the_same_outputs(pool, tmp_path, monkeypatch, settings, form):
    seen = []

    def check(folder, inputs, output, calls):
        seen.append((verify.reloaded_output(folder, inputs), output))

    monkeypatch.setattr("epmq.pipeline.run.check_reloaded", check)
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize=settings, format=form)
    run(recipe, progress=False, evaluate=False)
    ((reloaded, output),) = seen
    torch.testing.assert_close(reloaded, output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_match(monkeypatch, tmp_path, value):
    monkeypatch.setattr(verify, "reloaded_output", lambda folder, inputs, calls: torch.full((2, 3), value))
    with pytest.raises(RuntimeError, match="read back"):
        verify.check_reloaded(tmp_path, {}, torch.ones(2, 3))


def test_a_processor_that_would_be_another_one_in_the_output_is_refused(own_pool, tmp_path, monkeypatch):
    """The file that holds the words is left behind, as if it were none of the tokenizer's."""
    monkeypatch.setattr("epmq.models.side_files.WEIGHTS", ("tokenizer.json",))
    with pytest.raises(ValueError, match=r"base: the processor is another one when opened from the files that go into"):
        run(recipe_for(own_pool, output=str(tmp_path / "out")), progress=False)


def test_a_processor_that_is_another_one_in_the_output_is_not_published(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("epmq.pipeline.output.copy_files", lambda files, folder: None)
    with pytest.raises(RuntimeError, match=r"the processor is another one .* nothing was published"):
        run(recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "none"}), progress=False)
    assert not (tmp_path / "out").exists()
