"""Texts in windows of which each token knows its place."""

import pytest
import torch
from conftest import word_tokenizer
from transformers import BertTokenizerFast

from epmq.data.windows import best_span, join_words, split_words, window_batches, windows, word_tokens

CONTEXT = "a dog sat on the mat under the big red tree"


def test_windows_overlap_and_lose_no_part_of_a_text():
    tokenizer = word_tokenizer(ends=True)
    found = windows(tokenizer, [("the cat", CONTEXT), ("a", "dog")], 10)
    assert [window.owner for window in found] == [0] * (len(found) - 1) + [1] and len(found) > 2
    assert all(len(window) <= 10 for window in found)
    seen = {place for window in found[:-1] for place in window.places if place}
    assert sorted(CONTEXT[start:end] for start, end in seen) == sorted(CONTEXT.split())
    assert [window.places[:2] for window in found] == [[None, None]] * (len(found) - 1) + [[None, (0, 3)]]


def test_a_text_that_fits_is_one_window():
    (window,) = windows(word_tokenizer(ends=True), [CONTEXT], None)
    assert len(window) == len(CONTEXT.split()) + 1 and window.places[-1] is None


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="'the cat sat on the mat' leaves no room for its context within 6 tokens"):
        windows(word_tokenizer(), [("the cat sat on the mat", CONTEXT)], 6)
    slow = word_tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(ValueError, match="Slow does not tell where its tokens stand"):
        windows(slow, ["a"], None)


def test_batches_are_padded_and_hold_windows_by_length():
    tokenizer = word_tokenizer()
    (first, inputs), (second, _) = window_batches(tokenizer, windows(tokenizer, [CONTEXT, "a", "a cat"], None), 2)
    assert [window.owner for window in first] == [1, 2] and [window.owner for window in second] == [0]
    assert inputs["input_ids"].shape == (2, 2) and inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_the_best_span_by_hand():
    (window,) = windows(word_tokenizer(), [("the cat", "a dog sat on the mat")], None)
    scores = torch.zeros(len(window), 2)
    scores[0, 0] = scores[7, 1] = 9.0  # the question's first token does not count
    scores[4, 0], scores[3, 0] = 3.0, 2.0
    assert best_span(scores, window, 30) == (12.0, (6, 20))  # sat … mat
    assert best_span(scores, window, 4) == (12.0, (6, 20))
    assert best_span(scores, window, 3)[1] == (10, 20)  # on the mat: the likelier start is too far off
    scores[2, 1] = 20.0
    assert best_span(scores, window, 30) == (20.0, (0, 1))  # an end before the start is none


def test_words_and_where_they_stand():
    assert [("it's 5 €"[start:end]) for start, end in split_words("it's 5 €")] == ["it", "'", "s", "5", "€"]
    assert join_words(["a", "", "cat"]) == ("a  cat", [(0, 1), (2, 2), (3, 6)])


def test_joined_words_are_read_as_a_tokenizer_reads_them_one_by_one(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "'", "t", "play", "##ing", "cat", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer, words = BertTokenizerFast(str(tmp_path / "vocab.txt")), ["don't", "playing", "cat", "."]
    text, spans = join_words(words)
    (window,) = windows(tokenizer, [text], None)
    given = tokenizer(words, is_split_into_words=True)
    assert window.inputs["input_ids"] == given["input_ids"]
    firsts = dict[int, int]()
    for (number, _), index, _ in word_tokens(window, text, spans):
        firsts.setdefault(number, index)
    assert firsts == {number: given.word_ids().index(number) for number in range(4)}
