"""Tokens and templates as files say them, and tokenizers with the tokens of others."""

import json

import pytest
from conftest import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import chat_tokenizer

from epmq.data.tokens import (
    Tokens,
    chat_templates,
    has_tokenizer,
    join,
    own_files,
    read_tokens,
    same_tokenizer,
    special_tokens,
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model": null}',
        b'{"model": {"vocab": 3}}',
        b'{"model": {"vocab": [1]}}',
        b"\xff",
        b"[" * 9999,
    ],
)
def test_a_tokenizer_of_an_unknown_form_says_nothing(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_tokens(tmp_path) == Tokens()


def test_numbers_of_tokens(tmp_path):
    added = [{"content": "<x>", "id": 2}]
    for vocabulary in ({"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]):
        content = {"model": {"vocab": vocabulary}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert read_tokens(tmp_path).numbers == {"a": 0, "b": 1, "<x>": 2}


def test_numbers_of_tokens_in_older_files(tmp_path):
    """A character that Python takes for the end of a line is a token like others."""
    (tmp_path / "vocab.txt").write_text("a\n\u2028\nb\x85\nc\n", encoding="utf-8")
    assert read_tokens(tmp_path).numbers == {"a": 0, "\u2028": 1, "b\x85": 2, "c": 3}
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "nested": {}}')
    assert read_tokens(tmp_path).numbers == {"a": 0, "b": 1}


def test_added_tokens_in_older_files(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "<y>"}}}')
    assert read_tokens(tmp_path) == Tokens({"a": 0, "b": 1, "<x>": 2, "<y>": 3}, frozenset({"<x>", "<y>"}))


def test_tokenizers_are_the_same_byte_by_byte(tmp_path):
    for name, extra in (("one", []), ("two", []), ("three", ["<x>"])):
        chat_tokenizer(*extra).save_pretrained(tmp_path / name)
    (tmp_path / "none").mkdir()
    assert same_tokenizer(tmp_path / "one", tmp_path / "two")
    assert not same_tokenizer(tmp_path / "one", tmp_path / "three")
    assert not same_tokenizer(tmp_path / "one", tmp_path / "none")
    assert has_tokenizer(tmp_path / "one") and not has_tokenizer(tmp_path / "none")


def test_templates_and_roles_in_files_of_all_forms(tmp_path):
    assert chat_templates(tmp_path) == {} and special_tokens(tmp_path) == {}
    config = {"chat_template": [{"name": "default", "template": "a"}, {"name": "b", "template": "b"}]}
    config |= {"eos_token": {"content": "<e>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_templates(tmp_path) == {"default": "a", "b": "b"}
    assert special_tokens(tmp_path) == {"eos_token": "<e>"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert chat_templates(tmp_path) == {"default": "c"}
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert special_tokens(tmp_path) == {}


def test_added_tokens_and_words_join_another_tokenizer(tmp_path):
    other = chat_tokenizer("<x>", "<y>", words=["alpha"], pad_token="<y>")
    joined = join(word_tokenizer(pad_token=None), [("one", other, ["alpha", "<x>", "<y>"])])
    assert joined.added == {"one": ["alpha", "<x>", "<y>"]} and joined.left == {}
    assert joined.tokenizer.pad_token == "<y>"
    joined.tokenizer.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= own_files(joined.tokenizer)
    opened, text = AutoTokenizer.from_pretrained(tmp_path), "the <x>alpha cat alphabet<y>"
    ids, expected = opened(text)["input_ids"], other(text)["input_ids"]
    assert opened.convert_ids_to_tokens(ids) == other.convert_ids_to_tokens(expected)


def test_pieces_of_words_cannot_join():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=core)
    joined = join(word_tokenizer(), [("one", other, ["b", "ab"])])
    assert joined.left == {"one": ["b", "ab"]} and joined.added == {}
