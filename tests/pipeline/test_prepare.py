"""What is wrong with a base, an expert or its data is found before anything is computed."""

import json
import shutil

import pytest
from conftest import recipe_for
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from epmq.models.meta import named_class
from epmq.models.multitask import load
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe
from epmq.reporting.inspection import inspection_tables


@pytest.fixture
def copied(pool, tmp_path):
    """A copy of the pool that may be damaged."""
    shutil.copytree(pool, tmp_path / "pool")
    return tmp_path / "pool"


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    "lie",
    [
        {"hidden_size": "64"},
        {"hidden_size": 2**40},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 90_000},
        {"num_hidden_layers": 0},
        {"max_position_embeddings": 10**10},
        {"vocab_size": 33},
        {"pad_token_id": float("nan")},
        {"initializer_range": {}},
        {"layer_norm_eps": [1]},
        {"model_type": "unheard_of"},
        {"id2label": 7},
        {"dtype": "evil"},
        {"architectures": ["pipeline"], "model_type": ""},
    ],
)
def test_a_config_that_lies_is_refused_by_name(copied, lie):
    edit(copied / "base" / "config.json", **lie)
    with pytest.raises(ValueError, match=str(copied / "base")):
        prepare(load_recipe(recipe_for(copied)))


@pytest.mark.parametrize("name", ["pipeline", "logging", "BertConfig", "nothing", "", None, 7, ["BertModel"]])
def test_what_is_no_model_of_transformers_is_no_class(name):
    assert named_class(name) is None
    assert named_class("BertModel") is BertModel


def test_code_beside_a_config_is_not_run(copied, tmp_path):
    (copied / "base" / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: pass\n")
    edit(copied / "base" / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ValueError, match=r"config\.json: transformers cannot open this model"):
        prepare(load_recipe(recipe_for(copied)))
    assert not (tmp_path / "sprung").exists()


def test_tokens_without_an_embedding_are_found_in_any_example(copied):
    """The last example alone has the token: all are looked at."""
    tokenizer = AutoTokenizer.from_pretrained(copied / "base")
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(copied / "base")
    with (copied / "data" / "one.jsonl").open("a") as file:
        file.write(json.dumps({"text": "word39", "label": 0}) + "\n")
    with pytest.raises(ValueError, match="token"):
        prepare(load_recipe(recipe_for(copied)))


def test_a_head_that_cannot_be_built_is_found_before_compute(copied, tmp_path):
    expert = tmp_path / "expert"
    model = BertForSequenceClassification.from_pretrained(copied / "experts" / "one", num_labels=3)
    model.save_pretrained(expert)
    recipe = recipe_for(copied)
    recipe["experts"][0]["model"] = str(expert)
    prepare(load_recipe(recipe))
    edit(expert / "config.json", classifier_dropout=7.0)
    with pytest.raises(ValueError, match=r"expert one: the config of BertForSequenceClassification"):
        prepare(load_recipe(recipe))


@pytest.mark.parametrize("lie", [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 90_000}, {"hidden_size": "x"}])
def test_a_checkpoint_that_lies_is_not_loaded(copied, lie):
    edit(copied / "base" / "config.json", **lie)
    with pytest.raises(ValueError, match=str(copied / "base")):
        load(copied / "base")


@pytest.mark.parametrize("report", [{}, {"recipe": []}, {"recipe": {"base": 1}}])
def test_a_report_of_another_kind_is_named(copied, report):
    (copied / "base" / "report.json").write_text(json.dumps({"x": 1, **report}))
    with pytest.raises(ValueError, match=r"base: config\.json or report\.json is not as epmq writes it"):
        inspection_tables(copied / "base", layers=True)
