"""Scores by hand."""

import math

import numpy as np
import pytest

from epmq.pipeline.scoring import (
    are_entities,
    correlation,
    entities,
    entity_f1,
    f1,
    plain,
    rank_correlation,
    span_f1,
    span_match,
)


def test_correlations_by_hand():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and correlation(
        [1, 2, 3], [1, 0, -1]
    ) == pytest.approx(-1)
    assert correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert correlation([1, 1, 1], [1, 2, 3]) == 0.0
    assert correlation(range(9), np.exp(range(9))) < rank_correlation(range(9), np.exp(range(9))) == pytest.approx(1)
    assert rank_correlation([1, 1, 2, 2, 3], [2.5, 0.5, 0.5, 4.0, 3.0]) == pytest.approx(4.5 / math.sqrt(9 * 9.5))


def test_f1_of_counts():
    assert f1(1, 2, 4) == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert f1(0, 0, 0) == 1.0 and f1(0, 3, 0) == 0.0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("I-PER I-PER O I-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),  # none begins with a B
        ("B-PER I-PER E-PER S-LOC", {("PER", 0, 3), ("LOC", 3, 4)}),
        ("B-PER L-PER U-LOC U-LOC", {("PER", 0, 2), ("LOC", 2, 3), ("LOC", 3, 4)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_by_hand(tags, found):
    assert entities(tags.split()) == found


def test_f1_of_entities_by_hand():
    # The example in seqeval's README: one of two entities is right.
    wanted = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_f1(found, wanted) == 0.5
    assert entity_f1(wanted, wanted) == 1.0 and entity_f1([["O"]], [["B-X"]]) == 0.0
    assert entity_f1([["B-X", "O"]], [["B-X", "B-X"]]) == pytest.approx(2 / 3)


def test_names_of_entities():
    assert are_entities(["O", "B-PER", "I-PER"]) and are_entities(["I-LOC", "O"])
    assert not are_entities(["NOUN", "VERB"]) and not are_entities(["O"]) and not are_entities(["LABEL_0", "B-X"])


def test_answers_are_compared_as_squad_does():
    assert plain(" The  Cat's (big) hat!") == "cats big hat"
    assert span_match("the Cat.", ["dog", "cat"]) == 1.0 and span_match("a cat sat", ["cat"]) == 0.0
    assert span_f1("the big cat", ["cat", "a small dog"]) == pytest.approx(2 / 3)
    assert span_f1("cat cat", ["cat dog"]) == 0.5
    # No answer is right where there is none.
    assert span_match("", []) == span_f1("", []) == 1.0 and span_match("cat", []) == span_f1("cat", []) == 0.0
