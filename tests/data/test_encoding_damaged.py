"""What is damaged or does harm beside a tokenizer, in a chat template, or as a picture."""

import json
import shutil
from contextlib import suppress

import pytest
from transformers import BitImageProcessorPil

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import load_processor


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


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_a_broken_picture_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        next(encode(Examples("image", [tmp_path / "a.png"]), BitImageProcessorPil()))
