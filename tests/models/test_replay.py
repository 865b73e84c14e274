"""One run of the backbone gives the scores of all tasks: bit for bit those of each task's own run."""

from pathlib import Path

import pytest
import torch
from conftest import recipe_for
from task_experts import build, recipe_of

import epmq
from epmq.models.hooks import watch
from epmq.models.multitask import MultiTaskModel

TEXTS = ["a b c", "d", "e a d c b a"]


def merged(recipe: dict, out: Path) -> MultiTaskModel:
    epmq.merge({**recipe, "output": str(out)}, progress=False)
    return epmq.load(out)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> MultiTaskModel:
    """A model whose heads are transformers' task classes, each with a pooler of its own."""
    folder = tmp_path_factory.mktemp("native")
    kinds = [kind for kind in build(folder)]
    return merged(recipe_of(folder, *kinds), folder / "out")


def runs_of_first_block(model: MultiTaskModel, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    runs = []
    with watch(model.backbone.get_submodule("encoder.layer.0"), None, runs.append):
        scores = model.all_scores(**inputs)
    return scores, len(runs)


def test_heads_of_our_form_share_one_run(pool, tmp_path):
    model = merged(recipe_for(pool, quantize={"method": "none"}), tmp_path / "out")
    inputs = dict(model.processor(TEXTS, padding=True, return_tensors="pt"))
    scores, runs = runs_of_first_block(model, inputs)
    assert runs == 1 and list(scores) == model.tasks
    assert all(torch.equal(scores[task], model(task, **inputs)) for task in model.tasks)
    assert {task: model.answer(task, TEXTS) for task in model.tasks} == model.answer_all(TEXTS)
    assert model.answer_all(TEXTS * 20) == {task: answers * 20 for task, answers in model.answer_all(TEXTS).items()}


def test_heads_with_poolers_of_their_own_share_the_blocks(native):
    inputs = dict(native.processor(TEXTS, padding=True, return_tensors="pt"))
    plain = native.all_scores(**inputs)
    for task in ("number", "labels"):
        head = native.head(task)
        pooler = head.model.get_parameter("bert.pooler.dense.weight")
        head.own = {"bert.pooler.dense.weight": torch.randn(pooler.shape)}
    scores, runs = runs_of_first_block(native, inputs)
    assert runs == 1
    assert all(torch.equal(scores[task], native(task, **inputs)) for task in native.tasks)
    assert [task for task in native.tasks if not torch.equal(scores[task], plain[task])] == ["labels", "number"]
    assert all("forward" not in module.__dict__ for module in native.backbone.modules())
    for task in ("number", "labels"):
        native.head(task).own = {}


def test_what_answers_a_whole_text_is_answered_together(native):
    answers = native.answer_all(TEXTS)
    assert 1 < len(answers) < len(native.tasks)
    assert answers == {task: native.answer(task, TEXTS) for task in answers}


def test_another_batch_is_not_replayed(native):
    with torch.no_grad():
        for texts in (TEXTS, ["a"]):
            inputs = dict(native.processor(texts, padding=True, return_tensors="pt"))
            scores = native.all_scores(**inputs)
            assert all(torch.equal(scores[task], native(task, **inputs)) for task in native.tasks)


def test_a_model_without_such_a_task_says_so(native):
    spans = MultiTaskModel(native.backbone, {"only": native.head("span")}, native.processor)
    with pytest.raises(ValueError, match="no task of this model answers a whole text"):
        spans.scores(TEXTS)
