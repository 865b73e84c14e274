import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import weights
from conftest import padded_batches, perturbed, recipe_for
from families import FAMILIES
from task_experts import build, recipe_of, rows

import epmq
from epmq.calibration.distill import Distiller
from epmq.errors import InputError
from epmq.models.codes import CodedCheckpoint
from epmq.models.heads import HEAD_FILE, Head, load_head, save_head
from epmq.pipeline import refining
from epmq.pipeline import run as pipeline
from epmq.pipeline.journal import BLOCKS
from epmq.pipeline.prepare import prepare
from epmq.pipeline.refining import examples_of
from epmq.pipeline.run import calibration_batches, inputs_of, run
from epmq.pipeline.verify import WrongOutputError
from epmq.recipe_file import load_recipe
from tests.kit.runs import contents

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
DISTILL = {"method": "expert_guided", "refine": "distill", "refine_epochs": 2, "refine_learning_rate": 1e-3}
GROUPS = {"bits": 3, "group_size": 32, "symmetric": False}


@pytest.fixture(scope="module")
def plain(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that is not refined."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    run(recipe_for(pool, output=str(folder), quantize={"method": "gptq"}), **QUIET)
    return folder


@pytest.fixture(scope="module")
def refined(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the same run, refined."""
    folder = tmp_path_factory.mktemp("refined") / "out"
    run(recipe_for(pool, output=str(folder), quantize={**DISTILL, "method": "gptq"}), **QUIET)
    return folder


def test_the_held_out_loss_falls_and_the_report_says_so(refined):
    report = json.loads((refined / "report.json").read_text())
    losses, kept = report["refine"]["held_out"], report["refine"]["kept"]
    assert len(losses) == 3 and kept > 0 and losses[kept] == min(losses) < 0.9 * losses[0]
    assert report["refine"]["parameters"] > 1000 and report["seconds"]["refine"] >= 0
    page = (refined / "report.html").read_text()
    assert "Refined towards the experts" in page and f"epoch {kept} of 2" in page


def test_refine_has_examples_of_its_own(pool, tmp_path):
    recipe = recipe_for(pool, quantize={**DISTILL, "refine_samples": 6}, samples=4, batch_size=3)
    prepared = prepare(load_recipe(recipe), evaluate=False)
    for task, batches in prepared.calibration.items():
        assert sum(map(len, (batch["input_ids"] for batch in batches))) == 4
        assert sum(map(len, (batch["input_ids"] for batch in examples_of(prepared)[task]))) == 6
    lines = {task: iter([{"text": "one two"}, {"text": "two three one"}] * 4) for task in prepared.calibration}
    read = prepare(load_recipe(recipe), evaluate=False, calibration=lines)  # which can be read but once
    assert all(len(read.calibration[task][0]["input_ids"]) == 3 for task in lines)
    assert all(sum(len(batch["input_ids"]) for batch in examples_of(read)[task]) == 6 for task in lines)
    plain = prepare(load_recipe(recipe_for(pool, quantize=DISTILL, samples=4)), evaluate=False)
    assert not plain.refining and examples_of(plain) is plain.calibration
    more, same = (inputs_of(one, calibration_batches(one)) for one in (prepared, plain))
    assert "refining" in more and "refining" not in same


def test_no_code_moves_and_scales_norms_and_heads_do(plain, refined):
    before, after = weights(plain), weights(refined)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        if name.endswith(("weight_packed", "weight_shape", "embeddings.weight")) or "word_embeddings" in name:
            assert same, name
        elif name.startswith("encoder") or "LayerNorm" in name:
            assert not same, name
        else:  # no head reads the pooler
            assert same == ("pooler" in name or "position" in name), name
    for task in ("one", "two"):
        first, second = (load_head(folder / f"heads/{task}.safetensors") for folder in (plain, refined))
        assert not torch.equal(first.weight, second.weight) and first.labels == second.labels
    assert (plain / "config.json").read_bytes() == (refined / "config.json").read_bytes()


def test_the_output_gives_the_loss_that_the_report_has(pool, refined):
    """What is opened from disk is what was measured: its plain weights, on the examples that were held out."""
    report = json.loads((refined / "report.json").read_text())
    model, total = epmq.load(refined), 0.0
    assert epmq.load(refined, weights="packed-exact").tasks == ["one", "two"]
    from epmq.calibration.distill import head_loss, says
    from epmq.calibration.held_out import hold_out
    from epmq.pipeline.prepare import prepare

    recipe = epmq.load_recipe(recipe_for(pool, quantize={**DISTILL, "method": "gptq"}))
    prepared = prepare(recipe, evaluate=False)
    for task, expert in prepared.experts.experts.items():
        teacher = prepared.experts.whole_model(expert, torch.device("cpu"))
        losses, sizes = [], []
        with torch.no_grad():
            for batch in hold_out(prepared.calibration[task])[1]:
                said = says(model.backbone, model.head(task), batch)
                taught = says(teacher, expert.head(teacher), batch)
                losses.append(float(head_loss("class", said, taught)))
                sizes.append(len(said.scores))
        total += sum(loss * size for loss, size in zip(losses, sizes)) / sum(sizes) / 2
    assert total == pytest.approx(report["refine"]["held_out"][report["refine"]["kept"]], rel=1e-4)


def test_off_is_the_default_and_changes_nothing(pool, plain, tmp_path):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "gptq", "refine": False})
    report = run(recipe, **QUIET)
    assert contents(tmp_path / "out") == contents(plain) and "refine" not in report
    assert report["recipe"]["quantize"]["refine"] == "off"


def test_a_result_that_is_worse_is_not_kept(pool, plain, tmp_path):
    settings = {**DISTILL, "method": "gptq", "refine_learning_rate": 10.0, "refine_epochs": 9}
    report = run(recipe_for(pool, output=str(tmp_path / "out"), quantize=settings), **QUIET)
    assert contents(tmp_path / "out") == contents(plain)
    assert report["refine"]["kept"] == 0 and len(report["refine"]["held_out"]) == 3  # two were not better
    assert "none of 2 epochs was better" in (tmp_path / "out/report.html").read_text()


class Stopped(Exception):
    pass


def after(count: int, call: Any) -> Any:
    """A function that fails after so many calls."""
    left = [count]

    def counted(*args: Any, **fields: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return call(*args, **fields)

    return counted


@pytest.mark.parametrize(
    "place, name, count",
    [
        (refining, "says", 1),  # while an expert is asked
        (Distiller, "step", 2),  # in the first epoch
        (Distiller, "held_out_loss", 2),  # at the end of the second one
        (refining, "save_head", 1),  # while it is written
        (refining, "check_reloaded", 0),
        (pipeline, "check_processor", 0),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(pool, refined, tmp_path, monkeypatch, place, name, count):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={**DISTILL, "method": "gptq"})
    with monkeypatch.context() as patch:
        patch.setattr(place, name, after(count, getattr(place, name)))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, **QUIET)
    assert sorted(os.listdir(tmp_path)) == [".out.work"]
    assert "refine-start.safetensors" in os.listdir(tmp_path / ".out.work" / BLOCKS)
    trained: list[Any] = []
    step = Distiller.step
    monkeypatch.setattr(Distiller, "step", lambda *args: trained.append(args) or step(*args))
    monkeypatch.setattr(pipeline, "write_quantized", None)  # nothing is quantized again
    report = run(recipe, **QUIET)
    assert contents(tmp_path / "out") == contents(refined)
    whole = json.loads((refined / "report.json").read_text())
    assert report["refine"] == whole["refine"] and report["heads"] == whole["heads"]
    assert len(report["layers"]) == len(whole["layers"])
    epochs = {"says": 2, "step": 2, "held_out_loss": 1}.get(name, 0)
    assert len(trained) == epochs * 6
    assert any("quantized by a run that was stopped" in note for note in report["notes"])


def test_a_broken_output_is_not_kept(pool, refined, tmp_path, monkeypatch):
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={**DISTILL, "method": "gptq"})

    def garble(run, folder, student, tensors):
        written(run, folder, student, {name: tensor * 2 for name, tensor in tensors.items()})

    written = refining.write_refined
    with monkeypatch.context() as patch:
        patch.setattr(refining, "write_refined", garble)
        with pytest.raises(WrongOutputError, match="nothing was published"):
            run(recipe, **QUIET)
    run(recipe, **QUIET)
    assert contents(tmp_path / "out") == contents(refined)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_bytes_with_any_number_of_threads(pool, refined, tmp_path, threads, count):
    torch.manual_seed(7)
    torch.set_num_threads(count)
    report = run(recipe_for(pool, output=str(tmp_path / "out"), quantize={**DISTILL, "method": "gptq"}), **QUIET)
    assert contents(tmp_path / "out") == contents(refined)
    assert report["refine"] == json.loads((refined / "report.json").read_text())["refine"]
    assert torch.get_num_threads() == count


def test_groups_zero_points_and_dtypes(pool, tmp_path):
    method = {"method": "expert_guided", "rest": "as-stored", **GROUPS}
    for name, settings in (("plain", method), ("refined", {**method, **DISTILL})):
        run(recipe_for(pool, output=str(tmp_path / name), quantize=settings), **QUIET)
    first, second = (CodedCheckpoint(tmp_path / name) for name in ("plain", "refined"))
    for layer in first.grids:
        one, other = first.codes(layer), second.codes(layer)
        assert one.codes.equal(other.codes) and one.zero_point.equal(other.zero_point)
    report = json.loads((tmp_path / "refined/report.json").read_text())
    assert report["refine"]["held_out"][0] > min(report["refine"]["held_out"])
    assert second.tensor("encoder.layer.0.output.LayerNorm.weight").dtype == torch.float32


def objects(kinds: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    return {kind: rows(kind, 16) for kind in kinds}


def test_heads_of_every_kind(tmp_path):
    kinds = ("class", "number", "labels", "tags", "span", "choice")
    build(tmp_path)
    recipe = recipe_of(tmp_path, *kinds, quantize={**DISTILL, "method": "gptq"}, output=str(tmp_path / "out"))
    report = run(recipe, calibration=objects(kinds), **QUIET)
    losses = report["refine"]["held_out"]
    assert report["refine"]["kept"] > 0 and min(losses) < losses[0], losses
    model = epmq.load(tmp_path / "out")
    assert set(model.tasks) == set(kinds)


def language_pool(folder: Path, name: str) -> dict[str, Any]:
    """A base and two experts of a family, and batches of each task."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    model.save_pretrained(folder / "base")
    experts = []
    for seed, task in enumerate(("one", "two"), start=1):
        perturbed(type(model).from_pretrained(folder / "base"), seed, 0.03).save_pretrained(folder / task)
        experts.append({"name": task, "model": str(folder / task)})
    return {"base": str(folder / "base"), "experts": experts, "output": str(folder / "out")}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "flan_t5"])
def test_language_models_learn_the_next_token(tmp_path, name):
    recipe = language_pool(tmp_path, name)
    texts = [one for one in padded_batches(2, 7) for _ in range(6)]  # of which each is trained on
    if "t5" in name:
        texts = [{**one, "decoder_input_ids": one["input_ids"].flip(1)} for one in texts]
    batches = {"one": texts[:6], "two": texts[6:]}
    settings = {**DISTILL, "group_size": 32, "refine_learning_rate": 1e-4}
    report = run({**recipe, "quantize": settings}, calibration=batches, **QUIET)
    losses = report["refine"]["held_out"]
    assert report["refine"]["kept"] > 0 and min(losses) < losses[0], losses


def image_head(folder: Path, task: str, name: str) -> None:
    """Put a head on an expert: a task class, or one on the pooled output, as CLIP's zero-shot heads are."""
    torch.manual_seed(len(task))
    if name == "vit":
        config = transformers.ViTConfig.from_pretrained(folder / task, num_labels=3)
        model = transformers.ViTForImageClassification.from_pretrained(folder / task, config=config)
        model.save_pretrained(folder / task)
    else:
        head = Head(torch.randn(3, 16), torch.randn(3), "pooler", projection=torch.randn(16, 32))
        save_head(head, folder / task / HEAD_FILE)


@pytest.mark.parametrize("name", ["vit", "clip_vision"])
def test_pictures(tmp_path, name):
    recipe = language_pool(tmp_path, name)
    for task in ("one", "two"):
        image_head(tmp_path, task, name)
    pictures = {"pixel_values": torch.randn(7, 3, 28, 28)}
    settings = {**DISTILL, "refine_learning_rate": 3e-4}
    report = run({**recipe, "quantize": settings}, calibration=dict.fromkeys(("one", "two"), [pictures] * 6), **QUIET)
    assert report["refine"]["kept"] > 0


def test_what_cannot_be_refined_is_refused_before_any_compute(own_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "write_quantized", None)
    recipe = recipe_for(own_pool, output=str(tmp_path / "out"), quantize=DISTILL)

    def refusal(**fields: Any) -> str:
        with pytest.raises(InputError) as error:
            run({**recipe, **fields}, **QUIET)
        return str(error.value)

    for method in ("rtn", "none"):
        assert f"quantize.refine: {method} does not use it" in refusal(quantize={**DISTILL, "method": method})
    assert "use format: pack-quantized" in refusal(format="dequantized")
    assert "two examples at least" in refusal(samples=1)
    unrounded = {**DISTILL, "bits": 16, "embeddings": 16}
    assert "nothing is quantized" in refusal(quantize=unrounded)
    (own_pool / "experts/two/head.safetensors").unlink()
    assert "expert two has no head" in refusal()
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()


def test_a_dry_run_refuses_as_well(pool):
    with pytest.raises(InputError, match="use format: pack-quantized"):
        epmq.dry_run(recipe_for(pool, quantize=DISTILL, format="dequantized"), progress=False)


def test_a_task_of_no_weight_is_not_asked(pool, tmp_path, monkeypatch):
    asked: list[str] = []
    original = refining.ask_expert
    monkeypatch.setattr(refining, "ask_expert", lambda *args: asked.append(args[1].task) or original(*args))
    settings = {**DISTILL, "task_weights": {"one": 1.0, "two": 0.0}}
    run(recipe_for(pool, output=str(tmp_path / "out"), quantize=settings), **QUIET)
    assert asked == ["one"]
