"""Tokenizers and processors of images or sounds, as a directory holds them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import TEXTS, word_tokenizer
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPProcessor, WhisperFeatureExtractor
from vision_language import picture

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import fit_to_model, image_processor_of, load_processor, tokenizer_of


def test_processors_are_found(pool, tmp_path):
    assert hasattr(load_processor(pool / "base"), "convert_ids_to_tokens")
    assert load_processor(tmp_path) is None
    BitImageProcessorPil().save_pretrained(tmp_path)
    assert hasattr(load_processor(tmp_path), "image_mean")


def test_a_processor_of_both_is_found_in_one(tmp_path):
    """CLIP: one object with a tokenizer and an image processor, each of which is found in it."""
    CLIPProcessor(CLIPImageProcessorPil(), word_tokenizer()).save_pretrained(tmp_path)
    both = load_processor(tmp_path)
    assert tokenizer_of(both).eos_token_id == 2 and image_processor_of(both).do_resize
    assert tokenizer_of(BitImageProcessorPil()) is None and image_processor_of(word_tokenizer()) is None
    assert tokenizer_of(None) is None and image_processor_of(None) is None


def test_a_processor_of_sounds_is_none_of_pictures(tmp_path):
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    assert image_processor_of(load_processor(tmp_path)) is None and tokenizer_of(load_processor(tmp_path)) is None
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    joint = load_processor(tmp_path)
    assert type(joint).__name__ == "WhisperProcessor" and tokenizer_of(joint).eos_token_id == 2


def test_what_a_missing_library_keeps_closed_is_opened_in_parts(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ImportError("videos need a library")

    CLIPProcessor(CLIPImageProcessorPil(), word_tokenizer()).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", refuse)
    parts = load_processor(tmp_path)
    assert tokenizer_of(parts).eos_token_id == 2 and image_processor_of(parts).do_resize
    with pytest.raises(ValueError, match="videos need a library"):
        next(encode(Examples("image_text", [(picture(), TEXTS[0])]), parts))


def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(ValueError, match="its tokenizer has no words: the file of its vocabulary is missing"):
        load_processor(tmp_path)


def test_inputs_that_a_model_has_no_name_for_are_not_made():
    tokenizer = word_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    fit_to_model(tokenizer, lambda input_ids, attention_mask, token_type_ids: None)
    assert "token_type_ids" in next(encode(Examples("text", TEXTS), tokenizer))
    fit_to_model(tokenizer, lambda input_ids, **others: None)
    assert next(encode(Examples("text", TEXTS), tokenizer)).keys() == {"input_ids", "attention_mask"}
