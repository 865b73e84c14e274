import json
import shutil

import pytest
import torch
from conftest import perturbed, recipe_for, tiny_bert
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import faults, wrong_merges
from epmq.lineage import check_lineage, correlation, token_numbers
from epmq.pipeline import run
from epmq.sources import Sources
from epmq.spec import load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    faults.write_models(folder)
    return folder


def test_experts_of_the_base_pass_without_a_word(models):
    assert check_lineage(Sources(load_recipe(faults.recipe(models, "out")))) == []


@pytest.mark.parametrize("spoil", wrong_merges.WRONG, ids=lambda spoil: spoil.__name__)
def test_a_wrong_merge_is_named(models, tmp_path, spoil):
    assert not wrong_merges.caught(lambda folder: None, models, tmp_path / "right", faults.recipe)
    assert wrong_merges.caught(spoil, models, tmp_path / "wrong", faults.recipe)


def test_an_expert_of_another_base_is_refused(pool, tmp_path):
    torch.manual_seed(5)
    shutil.copytree(pool, tmp_path / "pool")
    tiny_bert().save_pretrained(tmp_path / "pool" / "experts" / "two")
    with pytest.raises(ValueError, match=r"^expert two: its weights have a correlation of -?0\.0\d with the base's"):
        run(recipe_for(tmp_path / "pool", output=str(tmp_path / "out")), progress=False)
    assert not (tmp_path / "out").exists()


def test_notes_are_in_the_report(pool, tmp_path):
    shutil.copytree(pool, tmp_path / "pool")
    shutil.copytree(pool / "base", tmp_path / "pool" / "experts" / "one", dirs_exist_ok=True)
    recipe = recipe_for(tmp_path / "pool", output=str(tmp_path / "out"), quantize={"method": "rtn"})
    report = run(recipe, progress=False, evaluate=False)
    assert "expert one is the base itself: it adds nothing to the merge" in report["notes"]


def test_an_expert_that_differs_outside_the_sample_is_no_copy(models, tmp_path):
    shutil.copytree(models, tmp_path / "models")
    model = type(tiny_bert()).from_pretrained(models / "base")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] += 1
    model.save_pretrained(tmp_path / "models" / "two")
    assert check_lineage(Sources(load_recipe(faults.recipe(tmp_path / "models", "out")))) == []


@given(st.floats(0, 3), st.integers(0, 99))
def test_correlation_falls_as_the_task_vector_grows(size, seed):
    base = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed))
    other = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed + 1000))
    found = correlation([base], [base + size * other])
    assert found == pytest.approx((1 + size**2) ** -0.5, abs=0.15)


def test_correlation_of_odd_layers():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert correlation([zero], [zero]) == 1 and correlation([zero], [one]) == 0 and correlation([], []) == 1
    assert correlation([one, one, zero], [one, one, one]) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model": null}',
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": [1]}}',
        b"\xff",
        b"[" * 9999,
    ],
)
def test_a_tokenizer_of_an_unknown_form_says_nothing(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert token_numbers(tmp_path) == {}


def test_numbers_of_tokens(tmp_path):
    added = [{"content": "<x>", "id": 2}]
    for vocabulary in ({"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]):
        content = {"model": {"vocab": vocabulary}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert token_numbers(tmp_path) == {"a": 0, "b": 1, "<x>": 2}


@pytest.mark.parametrize(("moved", "alike"), [(1, None), (30, 85)])
def test_a_few_moved_tokens_are_a_note_and_many_an_error(models, monkeypatch, moved, alike):
    ours = {f"word{number}": number - 140 for number in range(200)}
    theirs = ours | {f"word{number}": 500 for number in range(moved)}
    monkeypatch.setattr("epmq.lineage.token_numbers", lambda folder: theirs if folder.name == "two" else ours)
    sources = Sources(load_recipe(faults.recipe(models, "out")))
    if alike is None:
        assert check_lineage(sources) == ["expert two: 1 tokens have other numbers than in the base, such as 'word0'"]
    else:
        with pytest.raises(ValueError, match=f"expert two: its tokenizer numbers only {alike} % of the tokens"):
            check_lineage(sources)


def test_an_adapter_of_another_base_is_noted(models, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    adapter = get_peft_model(BertModel.from_pretrained(models / "base"), LoraConfig(target_modules=["query"]))
    for name, expected in (("base", 0), ("somebody/other-model", 1)):
        adapter.save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
        recipe = faults.recipe(models, "out")
        recipe["experts"][1]["model"] = str(tmp_path / "adapter")
        notes = [note for note in check_lineage(Sources(load_recipe(recipe))) if "trained on" in note]
        assert len(notes) == expected and all("expert two" in note and name in note for note in notes)


def test_a_perturbed_model_is_related():
    base = tiny_bert()
    sample = [base.encoder.layer[0].output.dense.weight.detach().clone()]
    other = [perturbed(base, 1, 0.005).encoder.layer[0].output.dense.weight.detach()]
    assert correlation(sample, other) > 0.9
