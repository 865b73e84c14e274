"""From examples to model inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, WORDS, word_tokenizer
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPProcessor

from epmq.data.encoding import encode, pack, to_device
from epmq.data.examples import Examples
from epmq.data.processors import load_processor


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(
        do_convert_rgb=False,
        do_resize=False,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def test_texts_become_padded_batches(pool):
    tokenizer = load_processor(pool / "base")
    texts = ["the cat sat", "a dog", "the big red tree and the small blue cat ran on"]
    batches = list(encode(Examples("text", texts, None), tokenizer, batch_size=2, max_length=6))
    assert [batch["input_ids"].shape for batch in batches] == [(2, 5), (1, 6)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batches[0]["input_ids"][0].tolist() == tokenizer("the cat sat")["input_ids"]


def test_images_become_pixels(tmp_path):
    expected = torch.tensor(images(3)).permute(0, 3, 1, 2) / 127.5 - 1
    batches = list(encode(Examples("image", images(3)), processor(), batch_size=2))
    assert [batch["pixel_values"].shape for batch in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    array = images(1)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms = [array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"), content]
    forms += [{"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    for form in forms:
        found = next(encode(Examples("image", [form]), processor()))["pixel_values"]
        torch.testing.assert_close(found[0], torch.tensor(array).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_other_modes_get_three_channels(tmp_path, mode):
    picture = Image.fromarray(images(1)[0]).convert(mode)
    picture.save(tmp_path / "a.png")
    for form in (picture, tmp_path / "a.png"):
        pixels = next(encode(Examples("image", [form]), processor()))["pixel_values"]
        expected = torch.tensor(np.asarray(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels[0], expected)


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


def test_images_with_texts_become_both(pool):
    both = SimpleNamespace(tokenizer=load_processor(pool / "base"), image_processor=processor())
    inputs = list(zip(images(3), TEXTS))
    batches = list(encode(Examples("image_text", inputs), both, batch_size=2, max_length=4))
    assert all(batch.keys() == {*both.tokenizer(TEXTS), "pixel_values"} for batch in batches)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(pixels, torch.tensor(images(3)).permute(0, 3, 1, 2) / 127.5 - 1)
    assert torch.equal(batches[1]["input_ids"], both.tokenizer(TEXTS[2:], return_tensors="pt")["input_ids"])
    assert batches[0]["input_ids"].shape == (2, 4)


def test_pairs_are_what_the_tokenizer_makes_of_two_texts(pool):
    tokenizer = load_processor(pool / "base")
    pairs = [("the cat", "a dog ran"), ("the big tree", "sat")]
    (batch,) = encode(Examples("text", pairs), tokenizer)
    expected = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    assert batch.keys() == expected.keys() and batch["token_type_ids"].sum() > 0
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_tokenizer_without_padding_pads_with_the_end(pool):
    tokenizer = word_tokenizer(pad_token=None)
    (batch,) = encode(Examples("text", ["the cat sat", "a"]), tokenizer)
    assert batch["input_ids"][1].tolist()[1:] == [2, 2] and batch["attention_mask"][1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", ["text", "chat", "seq2seq"])
def test_padding_is_on_the_right_whatever_the_tokenizer_says(kind):
    tokenizer = word_tokenizer(padding_side="left", chat_template=CHAT_TEMPLATE)
    inputs: list[Any] = ["the", "a cat sat on"]
    if kind == "chat":
        inputs = [[{"role": "user", "content": text}] for text in inputs]
    (batch,) = encode(Examples(kind, inputs, targets=inputs), tokenizer)
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name, batch["attention_mask"])
        assert (mask.diff(dim=1) <= 0).all() and mask[0].sum() < mask[1].sum()


def test_a_tokenizer_with_neither_padding_nor_end_pads_with_what_it_has():
    tokenizer = word_tokenizer(pad_token=None, eos_token=None, unk_token=None)
    (batch,) = encode(Examples("text", ["the cat sat", "a"]), tokenizer)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and tokenizer.pad_token is None


def test_texts_are_cut_to_what_is_asked_for_and_to_what_there_are_positions_for():
    examples = Examples("seq2seq", ["the cat sat on a mat"], targets=["the dog ran under a tree"], longest=(4, 3))
    for asked, expected in ((None, (4, 3)), (6, (4, 3)), (2, (2, 2))):
        (batch,) = encode(examples, word_tokenizer(), max_length=asked)
        assert (batch["input_ids"].shape[1], batch["labels"].shape[1]) == expected
    (batch,) = encode(examples, word_tokenizer(model_max_length=2))
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 2)


def test_a_joint_processor_gives_what_its_parts_give():
    """CLIP's, whose parts know nothing of each other."""
    joint, inputs = CLIPProcessor(CLIPImageProcessorPil(), word_tokenizer()), list(zip(images(3), TEXTS))
    parts = SimpleNamespace(tokenizer=joint.tokenizer, image_processor=joint.image_processor)
    for length in (None, 3):
        one, other = (next(encode(Examples("image_text", inputs), p, max_length=length)) for p in (joint, parts))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- encoder–decoders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
@torch.no_grad()
def test_targets_are_what_the_model_would_make_of_the_labels(family):
    """The mask is that of the decoder's inputs: padding that the shift brings in is masked, and nothing else is."""
    model, tokenizer = FAMILIES[family].build(), word_tokenizer(ends=True)
    model.config.pad_token_id = 0
    sources, targets = ["the cat", "a dog ran under a tree", "red"], ["big", "the small blue mat", "cat on mat"]
    batches = list(encode(Examples("seq2seq", sources, targets=targets), tokenizer, batch_size=2))
    for start, batch in zip((0, 2), batches):
        chunk, count = targets[start : start + 2], len(batch["labels"])
        wanted = [[*(tokenizer.convert_tokens_to_ids(word) for word in text.split()), 2] for text in chunk]
        assert [row[row != -100].tolist() for row in batch["labels"]] == wanted
        shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        padding = torch.cat([torch.zeros(count, 1, dtype=torch.bool), batch["labels"][:, :-1] == -100], dim=1)
        assert torch.equal(batch["decoder_attention_mask"], (~padding).long())
        assert (shifted[padding] == 0).all() and (shifted[:, 1:][~padding[:, 1:]] != 0).all()
        # Padding changes nothing: the loss is that of the pairs one by one.
        losses = model(**batch).logits.log_softmax(-1)
        for i, text in enumerate(chunk):
            (alone,) = encode(Examples("seq2seq", [sources[start + i]], targets=[text]), tokenizer)
            length = alone["labels"].shape[1]
            # Scores are near 35 here, where one step of float32 is 4e-6: the order of sums depends on the threads.
            torch.testing.assert_close(
                losses[i, :length], model(**alone).logits.log_softmax(-1)[0], rtol=1e-6, atol=1e-5
            )


def test_sources_and_targets_are_cut():
    examples = Examples("seq2seq", ["the cat sat on a mat"], targets=["the dog ran under a tree"])
    (batch,) = encode(examples, word_tokenizer(ends=True), max_length=4)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["decoder_attention_mask"].shape == (1, 4)


def test_pairs_may_be_the_source_of_a_target(pool):
    tokenizer = load_processor(pool / "base")
    (batch,) = encode(Examples("seq2seq", [("the cat", "a dog")], targets=["red"]), tokenizer)
    assert torch.equal(batch["input_ids"], tokenizer("the cat", "a dog", return_tensors="pt")["input_ids"])


# --- chat --------------------------------------------------------------------------------------------------------


def test_chats_go_through_the_template():
    tokenizer = word_tokenizer(chat_template=CHAT_TEMPLATE)
    chats = [
        [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}],
        [{"role": "user", "content": "dog"}],
    ]
    (batch,) = encode(Examples("chat", chats), tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["user", "the", "cat", "</s>", "assistant", "sat", "</s>"])
    assert batch["input_ids"][0].tolist() == ids
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    (cut,) = encode(Examples("chat", chats), tokenizer, max_length=3)
    assert cut["input_ids"][0].tolist() == ids[:3]


def test_chats_need_a_template():
    with pytest.raises(ValueError, match="chat_template"):
        next(encode(Examples("chat", [[{"role": "user", "content": "a"}]]), word_tokenizer()))


# --- windows of running text -------------------------------------------------------------------------------------

DOCUMENTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(texts=DOCUMENTS, length=st.integers(1, 12), ends=st.booleans())
def test_windows_hold_every_token_in_order_with_an_end_after_each_document(texts, length, ends):
    tokenizer = word_tokenizer(ends=ends)
    stream = [token for text in texts for token in [*tokenizer.convert_tokens_to_ids(text.split()), 2]]
    examples = Examples("causal", texts)
    if len(stream) < length:
        with pytest.raises(ValueError, match=f"the texts have {len(stream)} tokens in all, .* one window of {length}"):
            pack(examples, tokenizer, length, None, 0)
        return
    found = pack(examples, tokenizer, length, None, 0)
    assert found.kind == "tokens" and found.inputs.dtype == np.int64
    assert found.inputs.shape == (len(stream) // length, length)
    assert found.inputs.flatten().tolist() == stream[: found.inputs.size]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 600), count=st.integers(1, 40), length=st.integers(1, 9), seed=st.integers(0, 9))
def test_drawn_windows_are_whole_documents_in_a_seeded_order(size, count, length, seed):
    words = [WORDS[i % len(WORDS)] for i in range(size)]
    tokenizer, examples = word_tokenizer(), Examples("causal", words)
    if 2 * size < length:
        return
    found = pack(examples, tokenizer, length, count, seed)
    assert len(found) == min(count, 2 * size // length)
    assert np.array_equal(found.inputs, pack(examples, tokenizer, length, count, seed).inputs)
    order = np.random.default_rng(seed).permutation(size)
    stream = [token for i in order for token in (tokenizer.convert_tokens_to_ids(words[i]), 2)]
    assert found.inputs.flatten().tolist() == stream[: found.inputs.size]


def test_another_seed_draws_other_windows():
    examples = Examples("causal", [f"{a} {b}" for a in WORDS for b in WORDS])
    first, second = (pack(examples, word_tokenizer(), 8, 4, seed).inputs for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_a_window_is_as_long_as_the_tokenizer_allows():
    examples = Examples("causal", ["the cat sat"] * 600)
    assert pack(examples, word_tokenizer(), None, None, 0).inputs.shape[1] == 64
    assert pack(examples, word_tokenizer(model_max_length=int(1e30)), None, None, 0).inputs.shape[1] == 512


def test_windows_are_batches_without_padding():
    windows = pack(Examples("causal", TEXTS * 3), word_tokenizer(), 5, None, 0)
    batches = list(encode(windows, None, batch_size=4))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), torch.from_numpy(windows.inputs))
    assert all(batch["attention_mask"].min() == 1 and len(batch["input_ids"]) <= 4 for batch in batches)


def test_documents_that_are_not_packed_are_padded():
    (batch,) = encode(Examples("causal", TEXTS), word_tokenizer(), max_length=4)
    assert batch["attention_mask"].sum(1).tolist() == [4, 3, 2]


def test_packing_needs_a_tokenizer():
    with pytest.raises(ValueError, match=r"need the base model's tokenizer, found BitImageProcessor"):
        pack(Examples("causal", TEXTS), processor(), 4, None, 0)


# --- ready batches -----------------------------------------------------------------------------------------------


def test_ready_batches_are_left_as_they_are():
    batches = [{"input_ids": torch.ones(2, 3), "name": "x"}, {"input_ids": torch.ones(1, 5)}]
    assert list(encode(Examples("batches", batches), None, batch_size=1)) == batches
    moved = to_device(batches[0], torch.device("meta"))
    assert moved["input_ids"].device.type == "meta" and moved["name"] == "x"
