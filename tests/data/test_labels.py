"""How labels are read: as what a head answers."""

import numpy as np
import pytest

from epmq.data.labels import Labels


@pytest.mark.parametrize(
    ("labels", "value", "found"),
    [
        (Labels(), 2, 2),
        (Labels(), "2", 2),
        (Labels(), np.int64(1), 1),
        (Labels(), True, 1),
        (Labels("class", ("NEGATIVE", "POSITIVE")), "positive", 1),
        (Labels("class", ("NEGATIVE", "POSITIVE")), "1", 1),
        (Labels("class", ("a", "A")), "A", 1),
        (Labels("class", ("0", "1")), "1", 1),
        (Labels("class", ("True", "False")), True, 0),
        (Labels("class", ("one", "two"), 2), 7, 7),  # whether it is a class is checked for all labels at once
        (Labels("number"), 0.5, 0.5),
        (Labels("number"), "0.5", 0.5),
        (Labels("number"), 3, 3.0),
        (Labels("number", size=2), [1, 2.5], [1.0, 2.5]),
        (Labels("labels", ("a", "b", "c"), 3), [1, 0, 1], [1, 0, 1]),
        (Labels("labels", ("a", "b", "c"), 3), [1.0, False, True], [1, 0, 1]),
        (Labels("labels", ("a", "b", "c"), 3), ["c", "a"], [1, 0, 1]),
        (Labels("labels", ("a", "b", "c"), 3), ["1", "0", "1"], [1, 0, 1]),
        (Labels("labels", ("0", "1"), 2), ["0"], [1, 0]),
        (Labels("labels", ("0", "1"), 2), ["1", "0"], [1, 1]),
        (Labels("labels", ("a", "b", "c"), 3), [2], [0, 0, 1]),
        (Labels("labels", ("a", "b", "c"), 3), "b", [0, 1, 0]),
        (Labels("labels", ("a", "b", "c"), 3), [], [0, 0, 0]),
        (Labels("tags", ("O", "B-X"), 2), ["O", 1, -100], [0, 1, -100]),
        (Labels("span"), {"text": ["a", "b"], "answer_start": [0, 3]}, ["a", "b"]),
        (Labels("span"), [{"text": "a", "answer_start": 0}], ["a"]),
        (Labels("span"), "a", ["a"]),
        (Labels("span"), {"text": np.asarray(["a"], dtype=object)}, ["a"]),
        (Labels("span"), {"text": [], "answer_start": []}, []),
    ],
)
def test_a_label_is_read_as_what_the_head_answers(labels, value, found):
    assert labels.read(value) == found


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (Labels(), "spam", r"must be a class index \(an integer\)$"),
        (Labels(), None, "must be a class index"),
        (Labels(), 1.0, "must be a class index"),
        (Labels(), 2**70, "is 1.18e.21, which is no class index"),
        (Labels(), [0, 1], "not a list: .*multi_label_classification"),
        (Labels("class", ("a", "b")), "spam", "is 'spam', but the head's classes are a, b"),
        (Labels("class", ("a", "b")), None, "must be a class index .* or a class name"),
        (Labels("class", ("1", "2")), "1", "may be the head's class '1' or its class number 1"),
        (Labels("number"), "good", "must be a number, found 'good'"),
        (Labels("number"), None, "must be a number"),
        (Labels("number"), float("nan"), "must be a number"),
        (Labels("number"), [1, 2], "must be a number"),
        (Labels("number", size=2), 1, "must be a list of 2 numbers"),
        (Labels("labels", ("a", "b"), 2), [2], "has class 2, but the head has 2 classes"),
        (Labels("labels", ("a", "b"), 2), ["c"], "is 'c', but the head's classes are a, b"),
        (Labels("labels", ("a", "b"), 2), None, "must be a class index"),
        (Labels("tags", ("O", "B-X"), 2), 1, "must be a list with a class for each word"),
        (Labels("tags", ("O", "B-X"), 2), ["B-Y"], "is 'B-Y', but"),
        (Labels("tags", ("O", "B-X"), 2), [2], "has class 2, but the head has 2"),
        (Labels("span"), None, "must hold the right answers"),
        (Labels("span"), [1], "must hold the right answers as texts"),
        (Labels("span"), {"answer_start": [1]}, "must hold the right answers"),
    ],
)
def test_what_is_no_label_is_refused(labels, value, message):
    with pytest.raises(ValueError, match=message):
        labels.read(value)


def test_labels_of_all_examples():
    assert Labels().array([1, 0]).dtype == np.int64
    assert Labels("number").array([1.0, 0.5]).tolist() == [1.0, 0.5]
    assert Labels("labels", size=2).array([[1, 0], [0, 0]]).shape == (2, 2)
    assert Labels("tags").array([[1], [0, 1]]) == [[1], [0, 1]]


def test_names_are_known_where_one_is_a_class():
    labels = Labels("class", ("NEGATIVE", "POSITIVE"))
    assert labels.knows(["negative", "other"]) and not labels.knows(["0", "1"]) and not Labels().knows(["a"])
