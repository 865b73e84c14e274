"""Examples from the `datasets` library, from Python objects and from what a recipe names."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tables import ROWS, images, lines, table

from epmq.data.examples import Examples, Fields
from epmq.data.labels import Labels
from epmq.data.readers import fields_of, from_objects, from_rows, read_data, read_dataset, read_examples
from epmq.recipe import Data


def dataset(name: Path, count: int | None = None, use: str = "text", split: str = "train", **fields: Any) -> Examples:
    return read_dataset(str(name), None, split, Fields(**fields), use, count, 0)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_folder_of_tables_is_a_dataset(tmp_path, ending):
    (tmp_path / "mine").mkdir()
    table(tmp_path / "mine" / f"train{ending}", ROWS)
    table(tmp_path / "mine" / f"test{ending}", ROWS[:1])
    examples = dataset(tmp_path / "mine")
    assert examples.inputs == [row["text"] for row in ROWS] and examples.labels.tolist() == [2, 0, 1]
    assert len(dataset(tmp_path / "mine", split="test")) == 1
    with pytest.raises(FileNotFoundError, match=r"mine/other: datasets cannot open it \(Unknown split"):
        dataset(tmp_path / "mine", split="other")
    with pytest.raises(ValueError, match=r"mine/train, row 0: no text field 'sentence'"):
        dataset(tmp_path / "mine", text="sentence")


def test_a_dataset_that_numbers_its_classes_otherwise_than_the_head_is_read_by_name(tmp_path):
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(text=datasets.Value("string"), label=names, tags=datasets.Sequence(names))
    rows = {"text": ["a", "b"], "label": [0, 1], "tags": [[0, 1], [1]]}
    made = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "mine").mkdir()
    made.to_parquet(tmp_path / "mine" / "train.parquet")
    asked = Labels("class", ("POSITIVE", "NEGATIVE"))
    found = (
        read_dataset(str(tmp_path / "mine"), None, "train", Fields(), "text", None, 0, asked),
        from_objects(made, Fields(), "text", "here", asked),
    )
    assert [examples.labels.tolist() for examples in found] == [[1, 0]] * 2
    assert from_objects(made, Fields(), "text", "here", Labels("class", ("x", "y"))).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="item 1: field 'label' is 'positive', but the head's classes are negative, x"):
        from_objects(made, Fields(), "text", "here", Labels("class", ("negative", "x")))
    tags = Labels("tags", ("positive", "negative"), 2)
    words = from_objects(made.add_column("tokens", [["a", "b"], ["c"]]), Fields(), "words", "here", tags)
    assert words.labels == [[1, 0], [0]]


def test_a_draw_of_a_dataset_is_that_of_a_file(tmp_path):
    (tmp_path / "mine").mkdir()
    path = lines(tmp_path / "mine" / "train.jsonl", *({"text": f"t{i}", "label": i} for i in range(50)))
    drawn, whole = dataset(tmp_path / "mine", 7), read_examples(path).draw(7, 0)
    assert drawn.inputs == whole.inputs and drawn.labels.tolist() == whole.labels.tolist()
    assert len(dataset(tmp_path / "mine", 2, use="causal")) == 40


def test_pictures_and_class_names_of_a_dataset(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(image=datasets.Image(), label=names)
    pictures = [Image.fromarray(array) for array in images(4)]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 0]}, features=features)
    (tmp_path / "mine").mkdir()
    made.to_parquet(tmp_path / "mine" / "train.parquet")
    # Opened by the library, given as an object, and read from its file without the library.
    found = dataset(tmp_path / "mine"), from_objects(made, Fields(), "text", "here")
    for examples in found:
        assert examples.kind == "image" and examples.labels.tolist() == [0, 1, 1, 0]
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(examples.inputs, images(4)))
    raw = read_examples(tmp_path / "mine" / "train.parquet")
    assert raw.kind == "image" and raw.labels.tolist() == [0, 1, 1, 0] and isinstance(raw.inputs[0]["bytes"], bytes)


def test_pictures_of_a_dataset_are_decoded_when_they_are_asked_for(tmp_path, monkeypatch):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("bool"), other=datasets.Value("string"))
    content = {"image": [Image.fromarray(array) for array in images(6)], "label": [True, False] * 3, "other": ["x"] * 6}
    (tmp_path / "mine").mkdir()
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "mine" / "train.parquet")
    decoded: list[int] = []
    original = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or original(*args, **kwargs)
    )
    examples = dataset(tmp_path / "mine")
    assert examples.kind == "image" and len(examples) == 6 and not decoded
    assert examples.labels.tolist() == [1, 0, 1, 0, 1, 0] and examples.labels.dtype == np.int64
    taken = examples.take(np.array([4, 1]))
    assert len(decoded) == 2 and taken.labels.tolist() == [1, 0]
    assert np.array_equal(np.asarray(taken.inputs[0]), images(6)[4])
    assert dataset(tmp_path / "mine", label="none").labels is None
    with pytest.raises(ValueError, match=r"mine/train, row 0: field 'other' must be a class index"):
        dataset(tmp_path / "mine", label="other")


def test_a_dataset_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"dataset .*nowhere/train: datasets cannot open it \(Couldn't find"):
        dataset(tmp_path / "nowhere")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"dataset owner/name/sub/test: datasets cannot open it \(offline and more\)$"
    ):
        read_dataset("owner/name", "sub", "test", Fields(), "text", None, 0)


def test_a_dataset_without_rows_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict({"text": []}))
    with pytest.raises(ValueError, match=r"dataset owner/name/train: holds no examples"):
        dataset(Path("owner/name"))


def test_without_the_library_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"dataset owner/name: needs the datasets library \(pip install 'epmq\[data\]'"
    ):
        dataset(Path("owner/name"))


def test_objects_are_rows():
    made = datasets.Dataset.from_list(ROWS)
    for items in (ROWS, iter(ROWS), made, (dict(row) for row in ROWS)):
        examples = from_objects(items, Fields(), "text", "python objects")
        assert examples.kind == "text" and examples.inputs == [row["text"] for row in ROWS]
        assert examples.labels.tolist() == [2, 0, 1]
    numbers = from_objects([{"text": "a", "label": np.int32(4)}], Fields(), "text", "here").labels
    assert numbers.tolist() == [4] and numbers.dtype == np.int64


def test_objects_with_tensors_are_batches():
    batches = [{"input_ids": torch.ones(2, 3).long(), "name": "x"}, {"input_ids": torch.ones(1, 4).long()}]
    examples = from_objects(iter(batches), Fields(), "text", "here")
    assert examples.kind == "batches" and examples.inputs == batches and len(examples) == 2
    loader = torch.utils.data.DataLoader([{"pixel_values": torch.ones(3, 2, 2)} for _ in range(5)], batch_size=2)
    examples = from_objects(loader, Fields(), "text", "here")
    assert [len(batch["pixel_values"]) for batch in examples.inputs] == [2, 2, 1]


def test_objects_of_another_form_are_named():
    for items, message in (
        ([], "here: holds no examples"),
        (["just a text"], "here, item 0: no text field 'text' .not an object"),
        ([{"text": "a"}, {"txt": "b"}], "here, item 1: no text field 'text'"),
        ([{"input_ids": torch.ones(1)}, {"text": "b"}], "here, item 0: no text field"),
    ):
        with pytest.raises(ValueError, match=message):
            from_objects(items, Fields(), "text", "here")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.text(max_size=5), st.integers(-3, 9)), max_size=8))
def test_rows_keep_their_order(rows):
    found = from_rows(((f"row {i}", {"text": a, "label": b}) for i, (a, b) in enumerate(rows)), Fields(), "text", "x")
    labels = [] if found.labels is None else found.labels.tolist()
    assert list(zip(found.inputs, labels)) == rows


def test_a_recipe_names_a_file_or_a_dataset(tmp_path):
    (tmp_path / "mine").mkdir()
    path = table(tmp_path / "mine" / "train.jsonl", ROWS)
    columns = {"text": ["text", "other"], "answers": ["no", "yes", "perhaps"]}
    for data in (Data(path=str(path), **columns), Data(dataset=str(tmp_path / "mine"), **columns)):
        examples = read_data(data, "seq2seq", None, 0)
        assert examples.inputs == [(row["text"], row["other"]) for row in ROWS]
        assert examples.targets == ["perhaps", "no", "yes"]
    assert fields_of(None) == Fields() == fields_of(Data(path="a.jsonl"))
