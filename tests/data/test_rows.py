"""What a row is, and which of its columns are read."""

import numpy as np
import pytest
from tables import images

from epmq.data.examples import Fields
from epmq.data.labels import Labels
from epmq.data.readers import from_objects, read_data, read_examples
from epmq.data.rows import from_rows
from epmq.recipe import Data

NAMES = ("O", "B-X", "I-X")


def rows(*content):
    return [(f"row {i}", row) for i, row in enumerate(content)]


@pytest.mark.parametrize("labels", [[0.5, 1.5], ["neg", "pos"], [None, None], [True, False], [[1, 0], [0, 1]], [{}, 7]])
def test_labels_that_nobody_asks_for_may_be_anything(labels, tmp_path):
    content = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    found = from_objects(content, Fields(), "text", "data", None)
    assert found.inputs == ["text 0", "text 1"] and found.labels is None
    partly = from_objects([content[0], {"text": "x"}], Fields(), "text", "data", None)
    assert partly.labels is None


def test_labels_of_arrays_and_folders_that_nobody_asks_for(tmp_path):
    np.savez(tmp_path / "a.npz", images=images(2), labels=np.asarray([0.5, np.nan]))
    assert read_examples(tmp_path / "a.npz", labels=None).labels is None
    assert read_data(Data(path=str(tmp_path / "a.npz")), "text", None, 0, None).labels is None
    numbers = read_examples(tmp_path / "a.npz", labels=None)
    assert len(numbers) == 2
    with pytest.raises(ValueError, match="labels of dtype float64"):
        read_examples(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz, 1: field 'labels' must be a number"):
        read_examples(tmp_path / "a.npz", labels=Labels("number"))
    np.savez(tmp_path / "b.npz", images=images(2), labels=np.asarray(["dog", "cat"]))
    assert read_examples(tmp_path / "b.npz", labels=Labels("class", ("cat", "dog"))).labels.tolist() == [1, 0]


def test_a_folder_is_named_as_the_heads_class_is(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(images(1)[0]).save(tmp_path / name / "0.png")
    assert read_examples(tmp_path).labels.tolist() == [0, 1]
    assert read_examples(tmp_path, labels=Labels("class", ("Dog", "Cat"))).labels.tolist() == [1, 0]
    assert read_examples(tmp_path, labels=Labels("class", ("x", "y"))).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="dog: field 'folder' is 'dog', but the head's classes are cat, bird"):
        read_examples(tmp_path, labels=Labels("class", ("cat", "bird")))


def test_questions_words_and_choices():
    asked = {"question": "who", "context": "the cat", "answers": {"text": ["cat"]}}
    found = from_rows(rows(asked), Fields(), "question", "data", Labels("span"))
    assert (found.kind, found.inputs, found.labels) == ("question", [("who", "the cat")], [["cat"]])
    tagged = {"words": ["a", "cat"], "ner": ["O", 1]}
    fields = Fields(words="words", tags="ner")
    found = from_rows(rows(tagged), fields, "words", "data", Labels("tags", NAMES, 3))
    assert (found.kind, found.inputs, found.labels) == ("words", [["a", "cat"]], [[0, 1]])
    chosen = {"text": "the cat", "choices": ["sat", "ran"], "label": 1}
    found = from_rows(rows(chosen), Fields(), "choices", "data", Labels("choice"))
    assert (found.kind, found.inputs) == ("choices", [("the cat", ["sat", "ran"])]) and found.labels.tolist() == [1]
    wide = {"text": "the cat", "a": "sat", "b": "ran", "label": "0"}
    assert from_rows(rows(wide), Fields(choices=("a", "b")), "choices", "data").inputs == found.inputs


def test_texts_alone_will_do_where_nothing_is_scored():
    for use in ("question", "words", "choices"):
        assert from_rows(rows({"text": "the cat"}), Fields(), use, "data", None).kind == "text"


def test_several_columns_are_one_label():
    fields = Fields(label=("bad", "good"))
    row = {"text": "x", "bad": 0, "good": "1"}
    assert from_rows(rows(row), fields, "text", "data", Labels("labels", size=2)).labels.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "use", "labels", "message"),
    [
        ({"question": "who"}, "question", None, "no context field 'context'"),
        ({"question": "who", "context": "x", "answers": 3}, "question", Labels("span"), "field 'answers' must hold"),
        ({"tokens": "the cat"}, "words", None, "field 'tokens' must be a list of texts"),
        ({"tokens": []}, "words", None, "field 'tokens' must be a list of texts"),
        ({"tokens": ["a"], "tags": [0, 1]}, "words", Labels("tags", NAMES, 3), "1 words, but 2 in 'tags'"),
        ({"text": "x", "choices": ["a", 1]}, "choices", None, "field 'choices' must be a list of texts"),
        ({"choices": ["a"]}, "choices", None, "no text field 'text'"),
    ],
)
def test_a_row_that_lacks_something_is_named(row, use, labels, message):
    with pytest.raises(ValueError, match=f"data, row 0: {message}"):
        from_rows(rows(row), Fields(), use, "data", labels)
