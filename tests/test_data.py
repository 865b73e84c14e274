import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BitImageProcessorPil

from epmq.batches import encode, load_processor
from epmq.data import Examples, read_examples


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


def processor(size: int = 14) -> BitImageProcessorPil:
    return BitImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )


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
    assert type(error.value) is ValueError


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


def test_texts_become_padded_batches(pool):
    tokenizer = load_processor(pool / "base")
    texts = ["the cat sat", "a dog", "the big red tree and the small blue cat ran on"]
    batches = list(encode(Examples("text", texts, None), tokenizer, batch_size=2, max_length=6))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (1, 6)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batches[0]["input_ids"][0].tolist() == tokenizer("the cat sat")["input_ids"]


def test_images_become_pixels(folder):
    batches = list(encode(read_examples(folder), processor(), batch_size=4))
    assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    # The grey image comes out in three equal channels.
    grey = batches[1]["pixel_values"][-1]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    from_array = next(encode(Examples("image", images(1), None), processor()))["pixel_values"]
    torch.testing.assert_close(from_array[0], torch.tensor(images(1)[0]).permute(2, 0, 1) / 127.5 - 1)


def test_the_processor_must_fit_the_data(pool):
    texts, pictures = Examples("text", ["a"], None), Examples("image", images(1), None)
    tokenizer = load_processor(pool / "base")
    with pytest.raises(ValueError, match=r"image examples need the base model's image processor, found \w*Tokenizer"):
        next(encode(pictures, tokenizer))
    with pytest.raises(ValueError, match=r"text examples need the base model's tokenizer, found \w*ImageProcessor"):
        next(encode(texts, processor()))
    for examples in (texts, pictures):
        with pytest.raises(ValueError, match="found NoneType"):
            next(encode(examples, None))


def test_processors_are_found(pool, tmp_path):
    assert hasattr(load_processor(pool / "base"), "convert_ids_to_tokens")
    assert load_processor(tmp_path) is None
    processor().save_pretrained(tmp_path)
    assert hasattr(load_processor(tmp_path), "image_mean")
