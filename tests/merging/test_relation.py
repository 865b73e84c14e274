"""Merges that should not be: experts of another base, twice the same, with other tokens or labels."""

import json
import shutil

import pytest
import torch
from conftest import perturbed, recipe_for, tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from merges import open_folder, open_recipe
from transformers import BertModel, CLIPConfig, CLIPModel, LlamaModel

from epmq.merging.relation import check_relation, correlation
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.pipeline.run import run
from tests.kit import runs, wrong_merges
from tests.kit.architectures import ARCHITECTURES

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    runs.write_models(folder)
    return folder


def changed(models, folder, name):
    """A copy of all models in `folder`, and the one of that name in memory."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    return BertModel.from_pretrained(folder / name)


def test_experts_of_the_base_pass_without_a_word(models):
    assert check_relation(open_recipe(runs.recipe(models, "out"))) == []


@pytest.mark.parametrize("spoil", wrong_merges.WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_merge_is_named(models, tmp_path, spoil):
    assert not wrong_merges.caught(lambda folder: None, models, tmp_path / "right", runs.recipe)
    assert wrong_merges.caught(spoil, models, tmp_path / "wrong", runs.recipe)


def test_an_expert_of_another_base_is_refused(pool, tmp_path):
    torch.manual_seed(5)
    shutil.copytree(pool, tmp_path / "pool")
    tiny_bert().save_pretrained(tmp_path / "pool" / "experts" / "two")
    with pytest.raises(
        ValueError, match=r"^expert two: its weights have a correlation of -?0\.0\d with the base's.*weight'"
    ):
        run(recipe_for(tmp_path / "pool", output=str(tmp_path / "out")), progress=False)
    assert not (tmp_path / "out").exists()


def test_notes_are_in_the_report(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    shutil.copytree(pool / "base", tmp_path / "pool" / "experts" / "one", dirs_exist_ok=True)
    recipe = recipe_for(tmp_path / "pool", output=str(tmp_path / "out"), quantize={"method": "rtn"})
    report = run(recipe, progress=False, evaluate=False)
    assert "expert one is the base itself: it adds nothing to the merge" in report["notes"]


def test_an_expert_that_differs_outside_the_sample_is_no_copy(models, tmp_path):
    model = changed(models, tmp_path, "base")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] += 1
    model.save_pretrained(tmp_path / "two")
    assert check_relation(open_recipe(runs.recipe(tmp_path, "out"))) == []


@given(st.floats(0, 3), st.integers(0, 99))
def test_correlation_falls_as_the_task_vector_grows(size, seed):
    base = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed))
    other = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed + 1000))
    found = correlation(base, base + size * other)
    assert found == pytest.approx((1 + size**2) ** -0.5, abs=0.15)


def test_correlation_of_odd_layers():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert correlation(zero, zero) == 1 and correlation(zero, one) == 0


def test_one_layer_started_anew_is_no_other_base(models, tmp_path):
    model = changed(models, tmp_path, "two")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.normal_(std=0.02)
    model.save_pretrained(tmp_path / "two")
    assert check_relation(open_recipe(runs.recipe(tmp_path, "out"))) == []


def test_an_expert_far_from_the_base_is_noted(models, tmp_path):
    """Its correlation with the base is perfect."""
    model = changed(models, tmp_path, "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(tmp_path / "two")
    notes = check_relation(open_recipe(runs.recipe(tmp_path, "out")))
    assert notes == ["expert two is far from the base: its task vector has 3.0 times the base's norm"]


def test_the_sign_of_a_zero_makes_no_other_expert(models, tmp_path):
    """What an untrained adapter adds, 0, turns -0 into 0."""
    model = changed(models, tmp_path, "base")
    for name, zero in (("base", -0.0), ("two", 0.0)):
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight[0, 0] = zero
        model.save_pretrained(tmp_path / name)
    notes = check_relation(open_recipe(runs.recipe(tmp_path, "out")))
    assert notes == ["expert two is the base itself: it adds nothing to the merge"]


def test_more_than_ten_classes_in_one_order(models, tmp_path, monkeypatch):
    """As words, the keys of id2label would put 10 before 2."""
    changed(models, tmp_path, "two")
    names = [f"class {number}" for number in range(12)]
    save_head(Head(torch.ones(12, 128), torch.zeros(12), "mean", True, names), tmp_path / "one" / HEAD_FILE)
    opened = open_recipe(runs.recipe(tmp_path, "out"))
    config = {"id2label": {str(number): name for number, name in enumerate(names)}}
    monkeypatch.setattr(opened.experts["two"], "head_config", config)
    assert check_relation(opened) == []
    config["id2label"]["0"], config["id2label"]["11"] = names[11], names[0]
    assert [note[:46] for note in check_relation(opened)] == ["experts one and two have the same classes in a"]


def test_many_classes_in_another_order_are_told_in_few_words(models, tmp_path):
    changed(models, tmp_path, "two")
    names = [f"class {number}" for number in range(1000)]
    for task, order in (("one", names), ("two", [*names[:500], *names[:499:-1]])):
        save_head(Head(torch.ones(1000, 128), torch.zeros(1000), "mean", True, order), tmp_path / task / HEAD_FILE)
    (note,) = check_relation(open_recipe(runs.recipe(tmp_path, "out")))
    assert "from number 500 on: class 500, class 501" in note and "; class 999, class 998" in note
    assert len(note) < 400


def test_a_model_of_several_parts_has_embeddings_too(tmp_path):
    clip = CLIPModel(CLIPConfig(text_config={**SMALL, "vocab_size": 64}, vision_config={**SMALL, "image_size": 8}))
    for name, seed in (("base", 1), ("one", 2), ("two", 3)):
        perturbed(clip, seed, 0.001).save_pretrained(tmp_path / name)
    assert check_relation(open_recipe(runs.recipe(tmp_path, "out"))) == []
    (tmp_path / "base" / "vocab.json").write_text('{"a": 63, "b": 64}')
    with pytest.raises(ValueError, match="the tokenizer has token number 64, but the embeddings 64 rows"):
        check_relation(open_recipe(runs.recipe(tmp_path, "out")))


def test_an_adapter_of_another_base_is_noted(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(BertModel.from_pretrained(models / "base"), LoraConfig(target_modules=["query"]))
    for name, expected in (("base", 0), ("somebody/other-model", 1)):
        adapter.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
        recipe = runs.recipe(models, "out")
        recipe["experts"][1]["model"] = str(tmp_path / "adapter")
        notes = [note for note in check_relation(open_recipe(recipe)) if "trained on" in note]
        assert len(notes) == expected and all("expert two" in note and name in note for note in notes)


def test_a_perturbed_model_is_related():
    base = tiny_bert()
    sample = base.encoder.layer[0].output.dense.weight.detach().clone()
    assert correlation(sample, perturbed(base, 1, 0.005).encoder.layer[0].output.dense.weight.detach()) > 0.9


def test_convolutions_are_compared_where_there_are_no_linear_layers(tmp_path):
    resnet = ARCHITECTURES["resnet"]
    for name, seed in (("base", 0), ("one", 1)):
        resnet.build(seed).save_pretrained(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"expert one: its weights have a correlation of .* it was not fine-tuned from"
    ):
        check_relation(open_folder(tmp_path, "one"))


def test_of_a_part_only_what_it_has_is_compared(tmp_path):
    """The other layers are the base's, and would outvote its own."""
    whole = ARCHITECTURES["llava"].build()
    for name in ("base", "two"):
        whole.save_pretrained(tmp_path / name)
    torch.manual_seed(5)
    LlamaModel(whole.config.text_config).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="expert one: its weights have a correlation of"):
        check_relation(open_folder(tmp_path))
