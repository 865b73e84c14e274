"""The forward that is tried before anything is computed."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import recipe_for
from families import FAMILIES
from odd_families import albert, image_text_batch, llava, prepared_run, saved_recipe, switch, token_batch
from torch import nn

from epmq.calibration.calls import StubModel, forms, try_forwards
from epmq.errors import InputError
from epmq.merging.experts import ExpertSet
from epmq.notes import Notes
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe


def opened(folder: Any, build: Any) -> ExpertSet:
    recipe = load_recipe(saved_recipe(folder, build))
    return ExpertSet(recipe.base or "", recipe.experts)


def test_blocks_are_listed_in_the_order_in_which_they_are_called(tmp_path):
    experts = opened(tmp_path, FAMILIES["t5"].build)
    calls = try_forwards(experts, {"one": FAMILIES["t5"].batches()})
    assert calls.order == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert calls.repeated == () and experts.notes == []


def test_blocks_that_are_called_repeatedly_are_seen(tmp_path):
    calls = try_forwards(opened(tmp_path, albert), {"one": [token_batch(1)]})
    assert calls.order == calls.repeated and len(calls.order) == 2


def test_a_model_is_tried_without_memory_for_its_weights(tmp_path):
    model = StubModel(opened(tmp_path, FAMILIES["bert"].build)).model
    assert all(parameter.is_meta or not any(parameter.stride()) for parameter in model.parameters())


def test_a_stack_without_data_is_refused_by_name(tmp_path):
    texts = {"one": [token_batch(1)], "two": [token_batch(2)]}
    experts = opened(tmp_path, llava)
    with pytest.raises(InputError, match=r"no data reaches model\.vision_tower\.encoder\.layers .*pixel_values"):
        try_forwards(experts, texts)
    calls = try_forwards(experts, {**texts, "one": [token_batch(1), image_text_batch(3)]})
    assert [name.split(".")[1] for name in calls.order] == 2 * ["vision_tower"] + 2 * ["language_model"]
    assert experts.notes == ["model.vision_tower.encoder.layers is not calibrated on two, whose data does not reach it"]


def test_inputs_that_the_model_does_not_take_are_refused_before_any_compute(tmp_path):
    with pytest.raises(InputError, match=r"experts\.two\.calibration: AlbertModel takes input_ids, which"):
        prepared_run(tmp_path, albert, {"one": [token_batch(1)], "two": [{"pixels": torch.ones(1, 2)}]}, "gptq")
    with pytest.raises(InputError, match=r"experts\.one\.calibration: inputs of 40 tokens, but AlbertModel"):
        prepared_run(
            tmp_path, albert, {"one": [token_batch(1), token_batch(1, length=40)], "two": [token_batch(2)]}, "gptq"
        )


def test_a_mixtures_layers_are_not_judged_by_shapes(tmp_path):
    batch = token_batch(1)
    calls = try_forwards(opened(tmp_path, switch), {"one": [{**batch, "decoder_input_ids": batch["input_ids"]}]})
    assert len(calls.order) == 4 and not calls.repeated


def test_rounding_to_nearest_tries_nothing(tmp_path):
    assert prepared_run(tmp_path, albert, {}, "rtn").calls.order == ()


def test_of_each_form_the_longest_is_tried():
    long, short, other = token_batch(1, length=9), token_batch(2), {"input_ids": torch.ones(1, 3)}
    tried = list(forms([short, long, other, {**short, "labels": None}]))
    assert [one["input_ids"].shape for one in tried] == [(2, 9), (1, 3)]


class Block(nn.Module):
    def __init__(self, used: int, idle: int) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, used), nn.Linear(4, idle)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.used(x).sum()


class Model(nn.Module):
    def __init__(self, used: int, idle: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(used, idle), Block(used, idle)])

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def toy(model: nn.Module, tied: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(
        meta_model=lambda: copy.deepcopy(model).to("meta"), model=model, tied=tied or {}, notes=Notes()
    )


def test_more_than_half_of_a_stack_without_data_is_refused():
    inputs = {"one": [{"x": torch.ones(2, 4)}]}
    assert try_forwards(toy(Model(8, 4)), inputs).order == ("layers.0", "layers.1")
    with pytest.raises(InputError, match=r"no data reaches 2 linear layers of layers, such as layers\.0\.idle"):
        try_forwards(toy(Model(4, 8)), inputs)


def test_blocks_that_share_weights_are_refused():
    model, inputs = Model(8, 4), {"one": [{"x": torch.ones(2, 4)}]}
    tied = {"layers.1.used.weight": "layers.0.used.weight"}
    with pytest.raises(InputError, match=r"layers\.1\.used\.weight is layers\.0\.used\.weight"):
        try_forwards(toy(model, tied), inputs)
    model.layers[1] = model.layers[0]
    with pytest.raises(InputError, match="several blocks of layers are one and the same"):
        try_forwards(toy(model), inputs)


def test_a_recipe_knows_how_its_model_is_called(pool):
    calls = prepare(load_recipe(recipe_for(pool)), evaluate=False).calls
    assert calls.order == ("encoder.layer.0", "encoder.layer.1")
