import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tables import ROWS, images, lines, table

from epmq.data.examples import Fields
from epmq.data.readers import read_examples
from epmq.errors import InputError


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
    assert read_examples(path, Fields("sentence")).labels is None
    assert read_examples(path, Fields("sentence", "class")).labels.tolist() == [1, 0]


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


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_is_the_same_in_every_form(tmp_path, ending):
    path = table(tmp_path / f"a{ending}", ROWS)
    examples = read_examples(path)
    assert examples.kind == "text" and examples.targets is None
    assert examples.inputs == [row["text"] for row in ROWS]
    assert examples.labels.tolist() == [2, 0, 1] and examples.labels.dtype == np.int64
    pairs = read_examples(path, Fields(("target", "text")))
    assert pairs.kind == "text" and pairs.inputs == [(row["target"], row["text"]) for row in ROWS]
    translated = read_examples(path, use="seq2seq")
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
    ("row", "use", "message"),
    [
        ({"text": "a"}, "seq2seq", "no target field 'target'"),
        ({"text": "a", "target": 3}, "seq2seq", "no target field 'target'"),
        ({"text": "a", "label": "²"}, "text", "field 'label' must be a class index"),
        ({"text": "a", "label": "--1"}, "text", "field 'label' must be a class index"),
        ({"text": "a", "label": [1]}, "text", "field 'label' must be a class index"),
        ({"messages": "hi"}, "text", "field 'messages' must be a list of messages with 'role' and 'content'"),
        ({"messages": []}, "text", "field 'messages' must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "text", "field 'messages' must be a list of messages"),
        ({"messages": ["hi"]}, "text", "field 'messages' must be a list of messages"),
        ({"image": None, "label": 1}, "text", "no image field 'image'"),
        ({"image": "a.png", "text": 5}, "text", "no text field 'text'"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, row, use, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        read_examples(lines(tmp_path / "a.jsonl", "", row), use=use)


def test_a_row_without_the_second_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no text field 'other'"):
        read_examples(lines(tmp_path / "a.jsonl", "", {"text": "a"}), Fields(("text", "other")))


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
    path, prompt = lines(tmp_path / "a.jsonl", *rows), "'{a}' or '{b}'? Say {{yes}}."
    found = read_examples(path, Fields(prompt=prompt, answers=("no", "yes")), "seq2seq")
    assert found.inputs == ["'it's' or 'so'? Say {yes}.", "'no' or '{x}'? Say {yes}."]
    assert found.targets == ["yes", "no"]
    scored = read_examples(path, Fields(prompt=prompt, answer="{score:.1f}"), "seq2seq")
    assert scored.targets == ["2.2", "4.0"]
    plain = read_examples(path, Fields(prompt="{a}"))
    assert plain.kind == "text" and plain.inputs == ["it's", "no"] and plain.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
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
def test_a_template_that_does_not_fit_is_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: {message}"):
        read_examples(lines(tmp_path / "a.jsonl", {"a": "x", "label": 2}), Fields(**columns), "seq2seq")


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
