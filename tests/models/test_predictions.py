"""What the scores of heads say, with a model that is made of nothing but scores."""

import pytest
import torch
from conftest import word_tokenizer

from epmq.models import predictions

CONTEXT = "a dog sat on the mat under the big red tree"


def model(scores):
    """A model whose tokens' scores are a function of their ids [batch, tokens]."""

    class Made:
        processor, device = word_tokenizer(ends=True), torch.device("cpu")

        def __call__(self, task, **inputs):
            return scores(inputs["input_ids"])

    return Made()


def marked(tokenizer, first, last):
    """Scores that mark a word as the first and one as the last of an answer."""
    words = tokenizer.convert_tokens_to_ids([first, last])
    return lambda ids: torch.stack([(ids == word) * 5.0 for word in words], dim=-1)


@pytest.mark.parametrize("max_length", [None, 9, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_answer_is_found_in_whichever_window_it_is(max_length, batch_size):
    asked = model(marked(word_tokenizer(), "big", "tree"))
    pairs, done = [("the cat", CONTEXT), ("a cat", "the mat")], []
    found = predictions.spans(asked, "any", pairs, batch_size, max_length, done.append)
    assert found[0] == "big red tree" and found[1] in ("the", "mat", "the mat")
    assert sum(done) == 2


def test_an_answer_may_be_empty_only_where_that_is_asked_for():
    def scores(ids):
        found = torch.zeros(*ids.shape, 2)
        found[:, 0] = 9.0
        return found

    for text, empty in (("the", False), ("", True)):
        assert predictions.spans(model(scores), "any", [("a", "the")], may_be_empty=empty) == [text]
    assert predictions.spans(model(scores), "any", [("a", "")]) == [""]
    assert predictions.spans(model(scores), "any", []) == []


@pytest.mark.parametrize("max_length", [None, 6, 4])
def test_every_word_has_the_class_of_its_first_token(max_length):
    asked = model(lambda ids: torch.nn.functional.one_hot(ids % 3, 3))
    numbers = {word: word_tokenizer().convert_tokens_to_ids(word) % 3 for word in CONTEXT.split()}
    wanted = [(word, numbers[word]) for word in CONTEXT.split()]
    assert predictions.tags(asked, "any", [CONTEXT, "cat", ""], 2, max_length)[0] == wanted
    assert predictions.tags(asked, "any", [CONTEXT.split(), ["a", "\u200b \u200b", ""]], 2, max_length)[0] == wanted


def test_words_without_a_token_have_no_class():
    asked = model(lambda ids: torch.ones(*ids.shape, 2))
    assert predictions.tags(asked, "any", [["a", "", "cat"]]) == [[("a", 0), ("", None), ("cat", 0)]]
    assert predictions.tags(asked, "any", [""]) == [[]]


def test_signs_are_words_of_their_own():
    asked = model(lambda ids: torch.ones(*ids.shape, 2))
    assert [word for word, _ in predictions.tags(asked, "any", ["the cat, sat."])[0]] == ["the", "cat", ",", "sat", "."]
