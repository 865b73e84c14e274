import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from epmq.data.readers import Examples, Fields, from_objects, from_rows, read_dataset, read_examples
from epmq.errors import InputError


def lines(path: Path, *rows: object) -> Path:
    """A file with one line a row: text as it is, anything else as JSON."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in two classes, and files that are none."""
    for name, kinds in (("b_dog", ["png", "JPG"]), ("a_cat", ["webp", "bmp", "jpeg"])):
        (tmp_path / "images" / name / "deep").mkdir(parents=True)
        for i, kind in enumerate(kinds):
            Image.fromarray(images(1)[0]).save(tmp_path / "images" / name / f"{i}.{kind}")
        (tmp_path / "images" / name / "notes.txt").write_text("not an image")
    Image.fromarray(images(1)[0]).convert("L").save(tmp_path / "images" / "b_dog" / "deep" / "9.png")
    return tmp_path / "images"


def test_lines_of_text(tmp_path):
    rows = [{"text": "ä b", "label": 2, "other": None}, "", {"label": 0, "text": ""}]
    examples = read_examples(lines(tmp_path / "a.jsonl", *rows))
    assert examples.kind == "text" and examples.inputs == ["ä b", ""] and len(examples) == 2
    assert examples.labels.tolist() == [2, 0] and examples.labels.dtype == np.int64


def test_lines_without_labels_and_with_other_names(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"sentence": "x", "class": 1}, {"sentence": "y", "class": 0})
    assert read_examples(path, "sentence").labels is None
    assert read_examples(path, "sentence", "class").labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1]", "line 3: no text field 'text'"),
        ({"label": 1}, "line 3: no text field 'text'"),
        ({"text": 5, "label": 1}, "line 3: no text field 'text'"),
        ({"text": None, "label": 1}, "line 3: no text field 'text'"),
        ({"text": "x", "label": "spam"}, "line 3: field 'label' must be a class index"),
        ({"text": "x", "label": 1.0}, "line 3: field 'label' must be a class index"),
        ({"text": "x", "label": None}, "line 3: field 'label' must be a class index"),
        ({"text": "x"}, "only 1 of 2 lines have the field 'label'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = lines(tmp_path / "a.jsonl", {"text": "good", "label": 0}, "", row)
    with pytest.raises(ValueError, match=rf"a\.jsonl(, |: ){message}"):
        read_examples(path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "fine"}\n{"text": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not UTF-8") as error:
        read_examples(tmp_path / "a.jsonl")
    assert type(error.value) is InputError


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.npz", "folder"])
def test_nothing_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such data file or folder"):
        read_examples(tmp_path / name)


def test_no_examples(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "a.npz", images=images(0))
    for name in ("a.jsonl", "folder", "a.npz"):
        with pytest.raises(ValueError, match=f"{name}: holds no examples"):
            read_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.tsv", "a.npy", "a.xlsx"])
def test_other_forms_are_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: expected a .jsonl, .csv, .parquet or .npz file, or a folder"):
        read_examples(tmp_path / name)


def test_arrays_of_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=images(5), labels=np.arange(5, dtype=np.uint8))
    examples = read_examples(tmp_path / "a.npz")
    assert examples.kind == "image" and np.array_equal(examples.inputs, images(5))
    assert examples.labels.tolist() == [0, 1, 2, 3, 4] and examples.labels.dtype == np.int64
    np.savez(tmp_path / "b.npz", images=images(5))
    assert read_examples(tmp_path / "b.npz").labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": images(2)}, "needs an array 'images'"),
        ({"images": images(2).astype(np.float32)}, "needs an array 'images', uint8"),
        ({"images": images(2)[..., 0]}, "needs an array 'images', uint8"),
        ({"images": images(2)[..., :1]}, "needs an array 'images', uint8"),
        ({"images": images(2), "labels": np.arange(3)}, r"2 images but labels of shape \[3\]"),
        ({"images": images(2), "labels": np.ones((2, 2), int)}, r"2 images but labels of shape \[2, 2\]"),
        ({"images": images(2), "labels": np.array([0.5, 1.0])}, "labels .* integers"),
        ({"images": images(2), "labels": np.array(["cat", "dog"])}, "labels .* integers"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        read_examples(tmp_path / "a.npz")


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("field", ["images", "labels"])
def test_pickles_are_never_opened(tmp_path, field):
    arrays = {"images": images(1), "labels": np.zeros(1, int)}
    arrays[field] = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz: not a plain \.npz file"):
        read_examples(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"b\.npz: not a plain \.npz file"):
        read_examples(tmp_path / "b.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_broken_npz_is_named(tmp_path):
    np.savez(tmp_path / "good.npz", images=images(2))
    whole = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "array.npy", images(2))
    broken = {"empty": b"", "text": b"hello there", "cut": whole[: len(whole) // 2], "head": whole[:8]}
    broken["npy"] = (tmp_path / "array.npy").read_bytes()
    for name, content in broken.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz: not a plain \.npz file"):
            read_examples(tmp_path / f"{name}.npz")
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("images", "not an array")
    with pytest.raises(ValueError, match=r"zip\.npz: "):
        read_examples(tmp_path / "zip.npz")


def test_a_folder_of_classes(folder):
    examples = read_examples(folder)
    assert examples.kind == "image" and examples.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path.relative_to(folder).as_posix() for path in examples.inputs] == [
        *("a_cat/0.webp", "a_cat/1.bmp", "a_cat/2.jpeg"),
        *("b_dog/0.png", "b_dog/1.JPG", "b_dog/deep/9.png"),
    ]


def test_a_folder_without_classes_has_no_labels(folder):
    examples = read_examples(folder / "b_dog" / "deep")
    assert examples.labels is None and [path.name for path in examples.inputs] == ["9.png"]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 40), count=st.one_of(st.none(), st.integers(1, 50)), seed=st.integers(0, 100))
def test_a_draw_is_seeded_and_without_replacement(size, count, seed):
    examples = Examples("text", [str(i) for i in range(size)], np.arange(size))
    np.random.seed(5)
    before, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    drawn = examples.draw(count, seed)
    assert np.array_equal(np.random.get_state()[1], before) and torch.equal(torch.get_rng_state(), state)
    assert len(drawn) == (size if count is None else min(size, count))
    assert drawn.inputs == [str(i) for i in drawn.labels] and len(set(drawn.inputs)) == len(drawn)
    assert drawn.labels.tolist() == sorted(drawn.labels.tolist())
    assert examples.draw(count, seed).inputs == drawn.inputs


def test_draws_differ_with_the_seed_and_take_arrays_and_no_labels():
    examples = Examples("image", images(100), None)
    first, second = examples.draw(10, 0), examples.draw(10, 1)
    assert first.inputs.shape == (10, 8, 8, 3) and first.labels is None
    assert not np.array_equal(first.inputs, second.inputs)


# --- tables ------------------------------------------------------------------------------------------------------


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows in the form that the file's ending asks for."""
    if path.suffix == ".jsonl":
        return lines(path, *rows)
    if path.suffix == ".csv":
        frame = datasets.Dataset.from_list(rows).to_pandas()
        frame.to_csv(path, index=False)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


ROWS = [
    {"text": 'he said: "a, b"', "label": 2, "other": "x\ny", "target": "eins"},
    {"text": "ä ü 漢", "label": 0, "other": "", "target": "zwei"},
    {"text": "two\nlines", "label": 1, "other": "z", "target": "drei"},
]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_is_the_same_in_every_form(tmp_path, ending):
    path = table(tmp_path / f"a{ending}", ROWS)
    examples = read_examples(path)
    assert examples.kind == "text" and examples.targets is None
    assert examples.inputs == [row["text"] for row in ROWS]
    assert examples.labels.tolist() == [2, 0, 1] and examples.labels.dtype == np.int64
    pairs = read_examples(path, ("target", "text"))
    assert pairs.kind == "text" and pairs.inputs == [(row["target"], row["text"]) for row in ROWS]
    translated = read_examples(path, use="seq2seq", target="target")
    assert translated.kind == "seq2seq" and translated.labels is None
    assert translated.inputs == examples.inputs and translated.targets == ["eins", "zwei", "drei"]
    documents = read_examples(path, use="causal")
    assert documents.kind == "causal" and documents.inputs == examples.inputs and documents.labels is None


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_chats_are_read(tmp_path, ending):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": chat, "text": "not this"}, {"messages": chat[:1], "text": ""}]
    for use in ("text", "causal", "seq2seq"):
        examples = read_examples(table(tmp_path / f"a{ending}", rows), use=use)
        assert examples.kind == "chat" and examples.inputs == [chat, chat[:1]] and examples.labels is None


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_images_lie_beside_their_table(folder, ending):
    names = ["a_cat/0.webp", "b_dog/0.png"]
    path = table(folder / f"a{ending}", [{"image": name, "label": i} for i, name in enumerate(names)])
    examples = read_examples(path)
    assert examples.kind == "image" and examples.labels.tolist() == [0, 1]
    assert examples.inputs == [folder / name for name in names]
    path = table(folder / f"b{ending}", [{"image": name, "text": name[0]} for name in names])
    paired = read_examples(path)
    assert paired.kind == "image_text" and paired.labels is None
    assert paired.inputs == [(folder / name, name[0]) for name in names]
    path = table(folder / f"c{ending}", [{"image": names[0]}, {"image": "a_cat/none.png"}])
    with pytest.raises(ValueError, match=r"a_cat/none\.png: no such image"):
        read_examples(path)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "a"}, {"text": ("text", "other")}, "no text field 'other'"),
        ({"text": "a"}, {"use": "seq2seq"}, "no target field 'target'"),
        ({"text": "a", "target": 3}, {"use": "seq2seq"}, "no target field 'target'"),
        ({"text": "a", "label": "²"}, {}, "field 'label' must be a class index"),
        ({"text": "a", "label": "--1"}, {}, "field 'label' must be a class index"),
        ({"text": "a", "label": True}, {}, "field 'label' must be a class index"),
        ({"text": "a", "label": [1]}, {}, "field 'label' must be a class index"),
        ({"messages": "hi"}, {}, "field 'messages' must be a list of messages with 'role' and 'content'"),
        ({"messages": []}, {}, "field 'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}]}, {}, "field 'messages' must be a list of messages"),
        ({"messages": ["hi"]}, {}, "field 'messages' must be a list of messages"),
        ({"image": None, "label": 1}, {}, "no image field 'image'"),
        ({"image": "a.png", "text": 5}, {}, "no text field 'text'"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, row, settings, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        read_examples(lines(tmp_path / "a.jsonl", "", row), **settings)


def test_every_row_must_be_of_the_first_ones_kind(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for rows, message in (
        ([chat, {"text": "a"}], r"line 2: field 'messages'"),
        ([{"image": "b.png"}, {"text": "a"}], r"line 2: no image field"),
        ([{"text": "a"}, chat], r"line 2: no text field"),
    ):
        with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
            read_examples(lines(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,1\nb,x\n", r"a\.csv, line 3: field 'label' must be a class index"),
        (b"text,label\na,1\nhello, world,1\n", r"a\.csv, line 3: not CSV \(more values than the header has names"),
        (b"text,label\na,1\nb\n", r"a\.csv, line 3: field 'label' must be a class index"),
        (b"text,label\na,1\n,1\n", r"a\.csv, line 3: no text field 'text'"),
        (b'text,label\n"a,1\n', r"a\.csv, line 1: not CSV \(unexpected end of data"),
        (b"txt,label\na,1\n", r"a\.csv, line 2: no text field 'text'"),
        (b"text,label\n", r"a\.csv: holds no examples"),
        (b"", r"a\.csv: holds no examples"),
        (b"text\na\nna\xefve\n", r"a\.csv: not UTF-8"),
    ],
)
def test_a_bad_csv_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "a.csv")


def test_a_csv_from_a_spreadsheet_is_read(tmp_path):
    """With a byte order mark, and lines that end in CR LF."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\na, 1 \r\nb,-1\r\n")
    examples = read_examples(tmp_path / "a.csv")
    assert examples.inputs == ["a", "b"] and examples.labels.tolist() == [1, -1]


def test_a_long_text_fits_into_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 300_000 + "\n")
    assert len(read_examples(tmp_path / "a.csv").inputs[0]) == 300_000


def test_a_bad_parquet_is_named(tmp_path):
    whole = table(tmp_path / "good.parquet", ROWS).read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "cut": whole[:-9]}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.parquet: not a readable parquet file"):
            read_examples(tmp_path / f"{name}.parquet")
    table(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: no text field 'text'"):
        read_examples(tmp_path / "a.parquet")


def test_texts_and_targets_are_made_of_columns(tmp_path):
    rows = [{"a": "it's", "b": "so", "label": 1, "score": 2.25}, {"a": "no", "b": "{x}", "label": 0, "score": 4.0}]
    made = {"use": "seq2seq", "prompt": "'{a}' or '{b}'? Say {{yes}}."}
    found = read_examples(lines(tmp_path / "a.jsonl", *rows), **made, answers=("no", "yes"))
    assert found.inputs == ["'it's' or 'so'? Say {yes}.", "'no' or '{x}'? Say {yes}."]
    assert found.targets == ["yes", "no"]
    scored = read_examples(lines(tmp_path / "a.jsonl", *rows), **made, answer="{score:.1f}")
    assert scored.targets == ["2.2", "4.0"]
    plain = read_examples(lines(tmp_path / "a.jsonl", *rows), prompt="{a}")
    assert plain.kind == "text" and plain.inputs == ["it's", "no"] and plain.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{c}"}, "no field 'c', which '{c}' asks for"),
        ({"prompt": "{a:d}"}, "'{a:d}' cannot be filled in"),
        ({"prompt": "{a"}, "'{a' cannot be filled in"),
        ({"prompt": "{a.b}"}, "'{a.b}' cannot be filled in"),
        ({"prompt": "{a}", "answer": "{c}"}, "no field 'c'"),
        ({"prompt": "{a}", "answers": ("no", "yes")}, "field 'label' is 2, but there are 2 answers"),
        ({"prompt": "{a}", "answers": ("no", "yes"), "label": "a"}, "field 'a' must be a class index"),
    ],
)
def test_a_template_that_does_not_fit_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: {message}"):
        read_examples(lines(tmp_path / "a.jsonl", {"a": "x", "label": 2}), use="seq2seq", **settings)


# --- datasets ----------------------------------------------------------------------------------------------------


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


# --- Python objects ----------------------------------------------------------------------------------------------


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


def test_short_texts_come_first():
    pairs = Examples("text", [("aaa", "b"), ("a", ""), ("aa", "aaaa")], np.arange(3))
    assert pairs.by_length().labels.tolist() == [1, 0, 2]
    translated = Examples("seq2seq", ["aa", "a"], targets=["x", "y"]).by_length()
    assert translated.inputs == ["a", "aa"] and translated.targets == ["y", "x"]
    chats = Examples("chat", [[{"role": "user", "content": "a"}]])
    assert chats.by_length() is chats


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "not JSON"),
        ('{"text": "a", "label": ' + "9" * 30 + "}", "which is no class index"),
        ('{"text": "\\ud800"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
    ],
)
def test_a_line_that_nothing_can_take_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: .*{message}"):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "shape", ["(1000000000, 100, 100, 3)", "(9223372036854775807, 9, 9, 3)", "(4, 0, 0, 3)", "((((" * 200]
)
def test_an_array_that_lies_about_its_shape_is_refused(tmp_path, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_examples(tmp_path / "a.npz")
