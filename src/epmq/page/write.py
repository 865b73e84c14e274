"""The files of a page: one of HTML, and scripts that bring the model and what it runs on.

A page that is opened from a disk may fetch no file, but it may load scripts: what is not a script is in one, as text
in base64. So a double click opens it, and a web server is as good.
"""

import gzip
import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from epmq.page.vendored import CODE, GLUE, LOADER, ONNXRUNTIME, TOKENIZERS, WASM, licences

INDEX, FOLDER, LICENCES = "index.html", "files", "LICENSES.txt"
# Bytes in a script; with a text of more than half a billion characters a browser fails.
PIECE = 24 << 20


@dataclass(frozen=True)
class PageModel:
    """A model as a page shows it.

    Attributes:
        file: the ONNX file; large weights may lie beside it.
        kind: `text` or `picture`: what it is asked about.
        tasks: task → `answers` (`class`, `number` or `labels`) and `labels`, names of its classes.
        input: what becomes of a text or a picture (`epmq.page.inputs`).
    """

    file: Path
    kind: str
    tasks: dict[str, dict[str, Any]]
    input: dict[str, Any]

    @property
    def large(self) -> Path | None:
        """Where large weights are, if not in the file itself."""
        beside = self.file.with_name(f"{self.file.name}.data")
        return beside if beside.exists() else None

    @property
    def bytes(self) -> int:
        """Size of the ONNX file with its large weights."""
        return self.file.stat().st_size + (self.large.stat().st_size if self.large else 0)


def write_page(model: PageModel, folder: Path) -> None:
    """Write the page of a model into a folder.

    Raises:
        RuntimeError: npm could not fetch what it runs on.
    """
    runtime, scripts = ONNXRUNTIME.fetch(), folder / FOLDER
    scripts.mkdir()
    (scripts / "onnxruntime.js").write_bytes((runtime / LOADER).read_bytes())
    names = ["onnxruntime.js", *_tokenizers(model, scripts), f"{model.kind}.js", "page.js"]
    for name in names[-2:]:
        (scripts / name).write_text(_packaged(name), encoding="utf-8")
    data = {"glue": runtime / GLUE, "wasm": runtime / WASM, "model": model.file}
    for name, file in (data | ({"large": model.large} if model.large else {})).items():
        names += list(_write_pieces(name, file, scripts))
    (scripts / "settings.js").write_text(f"settings = {_json(_settings(model))};\n", encoding="utf-8")
    packages = [ONNXRUNTIME] + [TOKENIZERS] * (model.kind == "text")
    (scripts / LICENCES).write_text(licences(packages), encoding="utf-8")
    (folder / INDEX).write_text(_index(model, [*names, "settings.js"]), encoding="utf-8")


def _settings(model: PageModel) -> dict[str, Any]:
    """What `page.js` is told."""
    tasks = [{"name": name, **task} for name, task in model.tasks.items()]
    large = model.large.name if model.large else None
    return {"kind": model.kind, "tasks": tasks, "large": large, "input": model.input}


def _json(content: object) -> str:
    """JSON that is JavaScript, too."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def _tokenizers(model: PageModel, scripts: Path) -> Iterator[str]:
    """The library of tokenizers, which is a CommonJS module, as a script."""
    if model.kind == "text":
        code = (TOKENIZERS.fetch() / CODE).read_text(encoding="utf-8")
        start = "const page_tokenizers = ((module) => { const exports = module.exports;"
        script = f"{start}\n{code}\nreturn module.exports; }})({{ exports: {{}} }});\n"
        (scripts / "tokenizers.js").write_text(script, encoding="utf-8")
        yield "tokenizers.js"


def _write_pieces(name: str, file: Path, scripts: Path) -> Iterator[str]:
    """Scripts that bring a file to the page, in pieces."""
    packed = gzip.compress(file.read_bytes(), 6, mtime=0)
    starts = range(0, len(packed), PIECE)
    for number, start in enumerate(starts, start=1):
        script = f"{name}.js" if len(starts) == 1 else f"{name}-{number}.js"
        text = b64encode(packed[start : start + PIECE]).decode()
        (scripts / script).write_text(f'piece("{name}", "{text}");\n', encoding="ascii")
        yield script


def _index(model: PageModel, scripts: list[str]) -> str:
    tasks = len(model.tasks)
    form: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(_packaged), undefined=StrictUndefined, **form)
    return environment.get_template("index.html.j2").render(
        heading=f"{tasks} tasks, one model" if tasks > 1 else next(iter(model.tasks)),
        lead=f"{model.bytes / 1e6:.1f} MB, computed on this device: nothing is sent, and nothing is fetched.",
        remark="Written by epmq.",
        kind=model.kind,
        tasks=list(model.tasks),
        scripts=scripts,
        folder=FOLDER,
    )


def _packaged(name: str) -> str:
    """A template, stylesheet or script of this package."""
    return (files("epmq.page") / name).read_text(encoding="utf-8")
