"""What a page is made of; what npm would fetch is a stub here."""

import gzip
import json
import re
from base64 import b64decode
from pathlib import Path

import pytest

from epmq.page import write
from epmq.page.vendored import CODE, LOADER, ONNXRUNTIME, TOKENIZERS, Package

TASKS = {
    "movies": {"answers": "class", "labels": ["bad", "<b>good</b>"]},
    "stars & stripes": {"answers": "number", "labels": []},
}


@pytest.fixture(autouse=True)
def _stubs(tmp_path, monkeypatch):
    """Packages with files that hold their own names."""

    def fetch(package: Package) -> Path:
        folder = tmp_path / "packages" / package.version
        for name in package.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"// {name}")
        return folder

    monkeypatch.setattr(Package, "fetch", fetch)


def page_of(folder: Path, kind: str = "text", tasks: dict = TASKS, large: bytes = b"") -> Path:
    """A page of a model whose file is five thousand bytes."""
    file = folder / "model_q4.onnx"
    file.write_bytes(bytes(range(250)) * 20)
    if large:
        file.with_name("model_q4.onnx.data").write_bytes(large)
    out = folder / "page"
    out.mkdir()
    write.write_page(write.PageModel(file, kind, tasks, {"limit": 16}), out)
    return out


def scripts_of(page: Path) -> list[str]:
    """Content of the scripts that a page names, in their order."""
    names = re.findall(r'<script defer src="([^"]+)"></script>', (page / "index.html").read_text())
    assert {page / name for name in names} | {page / "files/LICENSES.txt"} == set((page / "files").iterdir())
    return [(page / name).read_text() for name in names]


def pieces_of(page: Path, name: str) -> bytes:
    """A file as the page puts it together."""
    found = [match for text in scripts_of(page) for match in re.findall(rf'^piece\("{name}", "(.*)"\);$', text)]
    return gzip.decompress(b"".join(map(b64decode, found)))


@pytest.mark.parametrize("piece", [1 << 20, 50])
def test_the_model_is_in_the_page_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(write, "PIECE", piece)
    page = page_of(tmp_path, large=b"large " * 100)
    assert pieces_of(page, "model") == (tmp_path / "model_q4.onnx").read_bytes()
    assert pieces_of(page, "large") == b"large " * 100
    assert len(scripts_of(page)) > 9 or piece > 50


def test_the_page_is_told_of_the_model(tmp_path):
    page = page_of(tmp_path)
    text = (page / "files" / "settings.js").read_text()
    settings = json.loads(text.removeprefix("settings = ").removesuffix(";\n"))
    assert settings["kind"] == "text" and settings["input"] == {"limit": 16} and settings["large"] is None
    assert settings["tasks"] == [{"name": name, **task} for name, task in TASKS.items()]
    assert (page / "files" / "onnxruntime.js").read_text() == f"// {LOADER}"
    assert f"// {CODE}\n" in (page / "files" / "tokenizers.js").read_text()


def test_a_page_names_no_address_and_forbids_to_fetch(tmp_path):
    text = (page_of(tmp_path) / "index.html").read_text()
    assert "//" not in text and "default-src 'none'" in text
    assert "<h1>2 tasks, one model</h1>" in text and "0.0 MB" in text
    assert '<h2 id="name-1">stars &amp; stripes</h2>' in text and '<textarea id="text"' in text


def test_a_page_for_pictures_has_no_tokenizer(tmp_path):
    page = page_of(tmp_path, "picture", {"digits": TASKS["movies"]})
    text = (page / "index.html").read_text()
    assert "<h1>digits</h1>" in text and 'type="file"' in text and "tokenizers.js" not in text
    assert TOKENIZERS.name not in (page / "files" / "LICENSES.txt").read_text()


def test_licences_go_with_what_they_are_of(tmp_path):
    text = (page_of(tmp_path) / "files" / "LICENSES.txt").read_text()
    assert f"{ONNXRUNTIME.name} {ONNXRUNTIME.version}: MIT" in text and "Permission is hereby granted" in text
    assert TOKENIZERS.name in text and "// package/LICENSE" in text
