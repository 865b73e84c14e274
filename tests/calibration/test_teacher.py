from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import recipe_for

from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import Teacher, equals_merge
from epmq.merge_settings import Average
from epmq.merging.merged import MergedWeights
from epmq.models.blocks import linears
from epmq.models.heads import Head
from epmq.models.hooks import watch
from epmq.models.loading import load_model
from epmq.pipeline.prepare import prepare
from epmq.quantization.hessian import Moments
from epmq.recipe_file import load_recipe


def teacher_of(recipe: dict[str, Any], head: Head | None = None) -> tuple[Teacher, list[dict[str, torch.Tensor]]]:
    """Expert two of a recipe beside its calibration inputs."""
    prepared = prepare(load_recipe(recipe))
    inputs = prepared.calibration["two"]
    batches = [Batch("two", index, one) for index, one in enumerate(inputs)]
    expert = prepared.experts.experts["two"]
    return Teacher(prepared.experts, expert, batches, lambda backbone: head, torch.device("cpu")), inputs


@torch.no_grad()
def test_a_teacher_sees_what_the_expert_itself_computes(pool):
    quantize = {"method": "expert_guided", "expert_features": 0.5}
    teacher, inputs = teacher_of(recipe_for(pool, quantize=quantize))
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    for index in range(2):
        block = f"encoder.layer.{index}"
        names = [name for name, _ in linears(expert.get_submodule(block))]
        points = [*names, "output.LayerNorm", None]
        teacher.run(block, 2 * points)
        assert all(parameter.is_meta for parameter in teacher.step.block.parameters())
        for i, batch in enumerate(inputs):
            with ExitStack() as stack:
                seen = {point: [] for point in points}
                for point in points:
                    stack.enter_context(watch(expert.get_submodule(block), point, seen[point].append))
                expert(**batch)
            for point in points:
                for _ in range(2):
                    assert torch.equal(teacher.take(i, point)[0], seen[point][0]), f"{block}, {point}"
        teacher.end_block()
    with pytest.raises(RuntimeError, match="two is at its end"):
        teacher.run("encoder.layer.2", [])


@torch.no_grad()
def test_an_expert_scores_its_batches_when_it_is_done(pool):
    head = Head(torch.randn(3, 64), torch.randn(3))
    teacher, inputs = teacher_of(recipe_for(pool), head)
    teacher.run("encoder.layer.0", [])
    teacher.end_block()
    with pytest.raises(RuntimeError, match=r"two is at block encoder\.layer\.1"):
        teacher.scores()
    teacher, inputs = teacher_of(recipe_for(pool), head)
    for index in range(2):
        teacher.run(f"encoder.layer.{index}", [])
        teacher.end_block()
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    logits = [head.logits(expert(**batch).last_hidden_state, batch["attention_mask"]) for batch in inputs]
    for _ in range(2):
        torch.testing.assert_close(teacher.scores(), logits)


def test_drift_is_the_mixed_moment():
    """W_k M − A G with M of the mixed inputs equals the correction made of G and the drift."""
    inputs, own = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    merged, expert, alpha = torch.randn(3, 8).double(), torch.randn(3, 8).double(), 0.3
    moments = Moments(8)
    moments.add(inputs, drift=own - inputs)
    mixed = (1 - alpha) * inputs + alpha * own
    definition = expert @ (mixed.T @ inputs) / 40 - merged @ (inputs.T @ inputs) / 40
    correction = (expert - merged).float() @ moments.gram + alpha * expert.float() @ moments.input_drift
    torch.testing.assert_close(correction.double(), definition, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_expert_holds_only_the_words_it_reads(pool):
    teacher, inputs = teacher_of(recipe_for(pool, quantize={"method": "expert_guided"}))
    words = teacher.model.get_input_embeddings()
    expert = load_model(pool / "experts" / "two", {"architectures": ["BertModel"]})
    seen: set[int] = set()
    for batch in inputs:
        embedded, whole = (model(batch["input_ids"]) for model in (words, expert.get_input_embeddings()))
        assert torch.equal(embedded, whole)
        seen |= set(batch["input_ids"].flatten().tolist())
        assert len(words.weight) == len(seen) < words.num_embeddings


def test_an_expert_that_is_the_merge_teaches_nothing(pool):
    recipe = recipe_for(pool)
    experts = prepare(load_recipe({**recipe, "experts": recipe["experts"][:1]})).experts
    alone = MergedWeights(experts, Average())
    assert equals_merge(experts, experts.experts["one"], alone)
    assert not equals_merge(experts, experts.experts["one"], experts.base)
