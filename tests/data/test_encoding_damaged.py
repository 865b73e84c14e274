"""What is damaged or does harm beside a tokenizer, in a chat template, or as a picture."""

import json
import shutil
from contextlib import suppress

import pytest
from conftest import word_tokenizer
from transformers import BitImageProcessorPil

from epmq.data.encoding import encode, load_processor, try_template
from epmq.data.examples import Examples


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"version": "1.0", "model": {}}', "[" * 100_000])
def test_a_broken_tokenizer_is_named(pool, tmp_path, content):
    shutil.copytree(pool / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"base: transformers cannot open the tokenizer"):
        load_processor(tmp_path / "base")


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(pool, tmp_path, monkeypatch):
    shutil.copytree(pool / "base", tmp_path / "base")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether code may run"))
    with suppress(ValueError):
        load_processor(tmp_path / "base")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        2 * "{% for a in range(3000) %}" + 2 * "{% endfor %}",  # a second or so: what runs on would slow other tests
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 'x' * 1000000000 }}",
    ],
)
def test_a_chat_template_that_fails_or_never_ends_is_refused(monkeypatch, template):
    monkeypatch.setattr("epmq.data.encoding.TEMPLATE_SECONDS", 0.1)
    chats = Examples("chat", [[{"role": "user", "content": "the cat"}]])
    with pytest.raises(ValueError, match="its chat template cannot be used"):
        next(encode(chats, word_tokenizer(chat_template=template)))


def test_a_template_that_would_fill_the_memory_is_not_started(monkeypatch):
    tokenizer = word_tokenizer(chat_template="{{ 'x' * 10**9 }}")
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", None)
    with pytest.raises(ValueError, match=r"large numbers: \*\*"):
        try_template(tokenizer, [{"role": "user", "content": "the cat"}])


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        next(encode(Examples("image", [tmp_path / "a.png"]), BitImageProcessorPil()))
