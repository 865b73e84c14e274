"""`epmq page`: what is refused before any compute, and what becomes of an export; what npm fetches is a stub."""

import json
import shutil

import pytest
from conftest import recipe_for

import epmq
from epmq.page.vendored import Package
from epmq.pipeline import paging


@pytest.fixture(scope="module")
def finished(pool, tmp_path_factory):
    """A packed checkpoint with two heads."""
    out = tmp_path_factory.mktemp("finished") / "out"
    epmq.run(recipe_for(pool, quantize={"method": "rtn"}, output=str(out)), progress=False, evaluate=False)
    return out


@pytest.fixture
def export(finished, tmp_path, monkeypatch):
    """An export of it, as far as a page reads it; nothing is fetched, and node is not asked."""
    folder = tmp_path / "export"
    shutil.copytree(finished, folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model_q4.onnx").write_bytes(b"model")
    (folder / "onnx" / "model_q4_int8.onnx").write_bytes(b"model that rounds")
    tasks = {"one": ("class", ["x", "y", "z"]), "two": ("labels", []), "words": ("tags", ["O"])}
    content = {task: {"answers": kind, "labels": labels} for task, (kind, labels) in tasks.items()}
    (folder / "onnx" / "tasks.json").write_text(json.dumps(content))
    files = tmp_path / "files"
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "tokenizers.min.cjs"):
        (files / "package" / "dist").mkdir(parents=True, exist_ok=True)
        (files / "package" / "dist" / name).write_text(name)
    (files / "package" / "LICENSE").write_text("Apache")
    monkeypatch.setattr(Package, "fetch", lambda package: files)
    monkeypatch.setattr(paging, "try_texts", lambda processor, settings: None)
    return folder


def test_an_export_becomes_a_page(export):
    found = epmq.page_checkpoint(export, progress=False)
    page = export.with_name("export-page")
    files = [file for file in page.rglob("*") if file.is_file()]
    assert found["page"] == str(page / "index.html") and found["bytes"] == sum(one.stat().st_size for one in files)
    assert found["tasks"] == ["one", "two"] and found["left_out"] == ["words"] and found["model_bytes"] == 5
    settings = json.loads((page / "files" / "settings.js").read_text().removeprefix("settings = ")[:-2])
    assert [task["name"] for task in settings["tasks"]] == ["one", "two"] and settings["kind"] == "text"
    assert settings["input"]["limit"] == 32  # the model has no more positions
    line = paging.page_line(found)
    assert line.endswith("2 tasks, 0.0 MB; open it in a browser; without words, which answer no whole text or picture")


def test_what_there_is_to_show_is_known_before_anything_is_fetched(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Package, "fetch", lambda package: pytest.fail("it fetches"))
    folder = tmp_path / "bare"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("heads"))
    with pytest.raises(ValueError, match="no head answers a whole text or picture"):
        epmq.page_checkpoint(folder)
    with pytest.raises(FileExistsError, match="exists already"):
        epmq.page_checkpoint(finished, tmp_path)
    with pytest.raises(FileNotFoundError):
        epmq.page_checkpoint(tmp_path / "nowhere")


def test_weights_that_are_not_packed_are_refused(finished, pool, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(Package, "fetch", lambda package: pytest.fail("it fetches"))
    shutil.copytree(pool / "base", tmp_path / "plain")
    shutil.copytree(finished / "heads", tmp_path / "plain" / "heads")
    with pytest.raises(ValueError, match="its weights are plain, so there are no codes"):
        epmq.page_checkpoint(tmp_path / "plain")


def test_a_model_without_its_tokenizer_is_refused(export):
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (export / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="BertModel takes neither texts nor pictures, or its tokenizer or processor"):
        epmq.page_checkpoint(export)


def test_a_folder_without_the_model_is_named(export):
    for file in (export / "onnx").glob("*.onnx"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no model\*\.onnx; write it with: epmq export DIR --to onnx"):
        epmq.page_checkpoint(export)
    assert not export.with_name("export-page").exists()
