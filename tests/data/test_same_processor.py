"""Two processors are the same where they make the same inputs of the same things."""

import json

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, word_tokenizer
from transformers import CLIPImageProcessorPil, CLIPProcessor, WhisperFeatureExtractor

from epmq.data.examples import Examples
from epmq.data.same_processor import difference, differs_in_media, encodes_alike, same


def images(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (word_tokenizer, word_tokenizer, None),
        (word_tokenizer, lambda: word_tokenizer(ends=True), "texts"),
        (word_tokenizer, lambda: word_tokenizer(model_max_length=7), "the settings of the tokenizer"),
        (word_tokenizer, lambda: word_tokenizer(chat_template=CHAT_TEMPLATE), "the settings of the tokenizer"),
        (lambda: images(8), lambda: images(8), None),
        (lambda: images(8), lambda: images(6), "pictures"),
        (lambda: CLIPProcessor(images(8), word_tokenizer()), lambda: images(8), "texts"),
        (WhisperFeatureExtractor, lambda: WhisperFeatureExtractor(hop_length=80), "sounds"),
    ],
)
def test_a_difference_is_named(one, other, expected):
    assert difference(one(), other()) == expected


def test_what_only_one_does_may_be_no_difference():
    both = CLIPProcessor(images(8), word_tokenizer())
    assert difference(both, images(8), shared=True) is None
    assert difference(both, images(6), shared=True) == "pictures"


def test_examples_are_compared_as_they_go_in():
    examples = Examples("text", ["the cat", "a dog sat"])
    assert encodes_alike(word_tokenizer(), word_tokenizer(), examples, 4)
    assert not encodes_alike(word_tokenizer(), word_tokenizer(ends=True), examples, 4)


def test_nested_values_are_the_same_in_every_entry():
    value = {"a": [torch.ones(2), (1, None)], "b": np.arange(3)}
    assert same(value, {"a": [torch.ones(2), (1, None)], "b": np.arange(3)})
    assert not same(value, {**value, "b": np.arange(4)}) and not same(value, {"a": value["a"]})


def test_experts_that_see_otherwise_are_found(tmp_path):
    images(8).save_pretrained(tmp_path / "like")
    images(6).save_pretrained(tmp_path / "unlike")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "preprocessor_config.json").write_text(json.dumps([]))
    assert differs_in_media(images(8), tmp_path / "unlike") == "pictures"
    for name in ("like", "broken", "absent"):
        assert differs_in_media(images(8), tmp_path / name) is None
    assert differs_in_media(word_tokenizer(), tmp_path / "unlike") is None
