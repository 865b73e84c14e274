"""Which tokens the merged model has, and that their rows are merged by token."""

import json

import pytest
import torch
from adapters import adapt
from checkpoints import weights
from merges import open_folder, recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import (
    END,
    FIRST,
    ROWS,
    START,
    TOKENS,
    WHOLE,
    assert_same,
    chat_tokenizer,
    merged,
    write_base,
    write_expert,
)

from epmq.merging.vocabulary import agree_on_tokens
from epmq.pipeline.prepare import prepare
from epmq.recipe_file import load_recipe

MORE = [f"<t{i}>" for i in range(12)]
TEXT = f"the {START} user cat {END}"
EMBEDDINGS = "model.embed_tokens.weight"


def test_tokens_in_rows_to_spare_are_the_experts(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END))
    report = merged(tmp_path, "one", **WHOLE)
    assert f"the output's tokenizer has 2 tokens from expert one: {START!r}, {END!r}" in report["notes"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(START)["input_ids"] == [TOKENS]
    assert len(weights(tmp_path / "out")[EMBEDDINGS]) == ROWS
    assert_same(tmp_path / "out", tmp_path / "one", TEXT)


@pytest.mark.parametrize("choice", ["auto", "union", "one"])
def test_grown_embeddings_give_the_expert(tmp_path, choice):
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END, *MORE), ROWS + 2)
    merged(tmp_path, "one", tokenizer=choice, **WHOLE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS + 2
    assert_same(tmp_path / "out", tmp_path / "one", f"{TEXT} <t11>")


@pytest.mark.parametrize("family", ["t5", "bart", "gemma"])
def test_tables_of_all_kinds_grow(tmp_path, family):
    """T5 ties its embeddings, BART has a bias over tokens beside."""
    write_base(tmp_path, family=family)
    write_expert(tmp_path, "one", chat_tokenizer(START, END, *MORE), ROWS + 2, family)
    merged(tmp_path, "one", **WHOLE)
    theirs, ours = weights(tmp_path / "one"), weights(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)


def test_other_tokens_of_the_same_numbers_have_rows_of_their_own(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END))
    write_expert(tmp_path, "two", chat_tokenizer("<a>", END))
    merged(tmp_path, **FIRST)
    one, two, out = (weights(tmp_path / name)[EMBEDDINGS] for name in ("one", "two", "out"))
    assert torch.equal(out[TOKENS], one[TOKENS]) and torch.equal(out[TOKENS + 2], two[TOKENS])
    torch.testing.assert_close(out[TOKENS + 1], (one[TOKENS + 1] + two[TOKENS + 1]) / 2)


@pytest.mark.parametrize("method", ["average", "ties", "dare", "slerp", "karcher"])
def test_a_new_token_is_the_mean_of_those_who_have_it(tmp_path, method):
    """The experts number the tokens otherwise, and have no task vector for what the base lacks."""
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END))
    write_expert(tmp_path, "two", chat_tokenizer(END, START, "<a>"))
    merged(tmp_path, merge={"method": method}, quantize={"method": "none"})
    one, two, out = (weights(tmp_path / name)[EMBEDDINGS] for name in ("one", "two", "out"))
    torch.testing.assert_close(out[TOKENS], (one[TOKENS] + two[TOKENS + 1]) / 2)
    torch.testing.assert_close(out[TOKENS + 2], two[TOKENS + 2])


def test_the_bases_tokenizer_leaves_tokens_out_with_a_note(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END, *MORE), ROWS + 2)
    opened = load_recipe(recipe_of(tmp_path, "one", tokenizer="base", **WHOLE))
    notes = prepare(opened, evaluate=False).experts.notes
    expected = f"expert one: 14 tokens are not in the output's tokenizer, left out: {START!r}, {END!r}"
    assert any(note.startswith(expected) for note in notes.departures)
    with pytest.raises(ValueError, match="strict: expert one: 14 tokens are not in"):
        prepare(opened, evaluate=False, strict=True)
    merged(tmp_path, "one", tokenizer="base", **WHOLE)
    assert torch.equal(weights(tmp_path / "out")[EMBEDDINGS], weights(tmp_path / "one")[EMBEDDINGS][:ROWS])


def test_tokens_that_moved_are_merged_by_token(tmp_path):
    """Where the rows moved with the numbers; where they did not, the tokenizer is another model's."""
    model = write_base(tmp_path)
    order = [*range(6), *range(TOKENS - 1, 5, -1), *range(TOKENS, ROWS)]
    tokenizer = chat_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    numbers = content["model"]["vocab"]
    content["model"]["vocab"] = {token: order[number] for token, number in numbers.items()}
    write_expert(tmp_path, "one", tokenizer)
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="expert one: its tokenizer numbers only 30 % of the tokens as the base's does"
    ):
        open_folder(tmp_path, "one")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for embeddings in (moved.get_input_embeddings(), moved.get_output_embeddings()):
        embeddings.weight.data = embeddings.weight.data[order]
    moved.save_pretrained(tmp_path / "one")
    notes = merged(tmp_path, "one", **WHOLE)["notes"]
    assert "expert one: 14 tokens have other numbers than in the base, such as 'a'" in notes
    assert_same(tmp_path / "out", tmp_path / "one", "the cat sat")
    assert model.config.vocab_size == ROWS


def test_rows_that_no_token_has_may_be_fewer_or_more(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(), TOKENS)
    write_expert(tmp_path, "two", chat_tokenizer(), ROWS + 8)
    notes = merged(tmp_path, **FIRST)["notes"]
    assert "expert two: its embeddings have 8 rows more than the base's that no token has, left out" in notes
    assert_same(tmp_path / "out", tmp_path / "one", "the cat sat")


def test_rows_without_a_tokenizer_are_refused_by_name(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", None, ROWS + 2)
    with pytest.raises(
        ValueError, match=r"expert one: tensor 'model.embed_tokens.weight' is \[34, 64\].*tokenizer beside"
    ):
        open_folder(tmp_path, "one")


def test_a_base_without_a_tokenizer_takes_an_experts(tmp_path):
    write_base(tmp_path)
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    write_expert(tmp_path, "one", chat_tokenizer(START, END))
    write_expert(tmp_path, "two", chat_tokenizer("<a>"))
    notes = merged(tmp_path, **FIRST)["notes"]
    assert "the base has no tokenizer: the output takes that of expert one" in notes
    assert_same(tmp_path / "out", tmp_path / "one", TEXT.replace(START, "the"))


def test_an_adapter_with_embeddings_of_its_own(tmp_path):
    write_base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    adapted = adapt(model, tmp_path / "one", target_modules=["q_proj"])
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    for name in ("one", "whole"):
        chat_tokenizer(START, END, *MORE).save_pretrained(tmp_path / name)
    write_expert(tmp_path, "two", chat_tokenizer())
    merged(tmp_path, **FIRST)
    assert_same(tmp_path / "out", tmp_path / "whole", f"{TEXT} <t11>")


def test_an_adapter_saved_without_its_embeddings_is_noted(tmp_path):
    write_base(tmp_path)
    adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "one", target_modules=["q_proj"])
    chat_tokenizer(START, END, *MORE).save_pretrained(tmp_path / "one")
    opened = open_folder(tmp_path, "one")
    expected = "expert one: 2 tokens of its tokenizer have no row in its embeddings, left out: '<t10>', '<t11>'"
    assert expected in opened.notes.departures and opened.model.config.vocab_size == ROWS


def test_an_expert_that_is_named_must_have_a_tokenizer(tmp_path):
    write_base(tmp_path)
    write_expert(tmp_path, "one", None)
    with pytest.raises(ValueError, match="tokenizer: expert one has none that can be read"):
        agree_on_tokens(open_folder(tmp_path, "one"), "one")
