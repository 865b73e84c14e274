"""A finished checkpoint as a page that answers all its tasks in a browser."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epmq.data.processors import image_processor_of, load_processor, tokenizer_of
from epmq.errors import InputError
from epmq.export.onnx import FOLDER, TASKS
from epmq.export.target import find_target
from epmq.files import check_output, read_json, whole_directory
from epmq.models.checkpoint import architecture_of, read_config, resolve
from epmq.models.codes import CodedCheckpoint
from epmq.models.meta import named_class
from epmq.models.multitask import HEADS, WHOLE
from epmq.models.side_files import CONFIG
from epmq.page.inputs import picture_settings, text_settings, try_pictures, try_texts
from epmq.page.vendored import ONNXRUNTIME
from epmq.page.write import INDEX, PageModel, write_page
from epmq.pipeline.exporting import contents_of, stored_examples, write_target
from epmq.pipeline.tasks import task_of_head
from epmq.runtime import progress_bars


def page_checkpoint(path: str | Path, output: str | Path | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Write a page that answers all tasks of a finished checkpoint on the machine of whoever opens it.

    Args:
        path: a checkpoint of `format: pack-quantized` that epmq wrote, or an export of one to ONNX.
        output: a directory that must not exist; by default `PATH-page`.
        progress: show progress bars.

    Returns:
        `page`, the file to open; `bytes` of all its files, `model_bytes` of the ONNX file; `tasks`, and `left_out`,
        those that do not answer a whole text or picture.

    Raises:
        MissingError, InputError, OutputExistsError: before any compute; what does not fit is named.
        RuntimeError: npm could not fetch what the page runs on, or the export computes something else.
    """
    folder = resolve(path)
    output = check_output(output if output is not None else folder.with_name(f"{folder.name}-page"))
    config, kinds = read_config(folder / CONFIG), kinds_of(folder)
    asked = [task for task, kind in kinds.items() if kind in WHOLE]
    if not asked:
        raise InputError(f"{folder}: no head answers a whole text or picture, and a page shows nothing else")
    source = None if (folder / FOLDER).is_dir() else source_of(folder)
    ONNXRUNTIME.fetch()
    kind, settings = input_of(folder, config)
    with onnx_folder(folder, source, progress) as onnx, whole_directory(output) as work:
        tasks = read_json(onnx / TASKS)
        write_page(PageModel(onnx_file(onnx), kind, {task: tasks[task] for task in asked}, settings), work)
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        model_size = sum(file.stat().st_size for file in onnx.glob(f"{onnx_file(onnx).name}*"))
    left = [task for task in kinds if task not in asked]
    return {"page": str(output / INDEX), "bytes": size, "model_bytes": model_size, "tasks": asked, "left_out": left}


def kinds_of(folder: Path) -> dict[str, str | None]:
    """Task → what its head answers, of a checkpoint or an export."""
    if (folder / FOLDER / TASKS).exists():
        return {task: content["answers"] for task, content in read_json(folder / FOLDER / TASKS).items()}
    return {file.stem: task_of_head(file).kind for file in sorted((folder / HEADS).glob("*.safetensors"))}


def input_of(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Whether a model takes texts or pictures, and what becomes of them (`epmq.page.inputs`), which is tried."""
    processor, name = load_processor(folder), architecture_of(config)
    main = getattr(named_class(name), "main_input_name", None)
    tokenizer, images = tokenizer_of(processor), image_processor_of(processor)
    if main == "input_ids" and tokenizer is not None:
        settings = text_settings(tokenizer, config)
        try_texts(processor, settings)
        return "text", settings
    if main == "pixel_values" and images is not None:
        settings = picture_settings(images)
        try_pictures(processor, settings)
        return "picture", settings
    raise InputError(f"{folder}: {name} takes neither texts nor pictures, or its tokenizer or processor is missing")


def source_of(folder: Path) -> CodedCheckpoint:
    """A checkpoint that can be exported to ONNX; what it cannot hold is an InputError."""
    target, source = find_target("onnx"), CodedCheckpoint(folder)
    target.check(contents_of(source))
    return source


@contextmanager
def onnx_folder(folder: Path, source: CodedCheckpoint | None, progress: bool) -> Iterator[Path]:
    """The folder with the ONNX file: that of an export, or one that is made for the length of a `with` block."""
    if source is None:
        yield folder / FOLDER
        return
    with tempfile.TemporaryDirectory(prefix="epmq-page-") as work, progress_bars(progress) as bar:
        write_target("onnx", source, Path(work), stored_examples(folder), bar)
        yield Path(work) / FOLDER


def onnx_file(folder: Path) -> Path:
    """The model among the files of an export: the exact one, where there are several."""
    found = sorted(folder.glob("model*.onnx"), key=lambda file: (len(file.name), file.name))
    if not found:
        raise InputError(f"{folder}: no model*.onnx; write it with: epmq export DIR --to onnx")
    return found[0]


def page_line(page: dict[str, Any]) -> str:
    """What became of a page, in a line."""
    left = f"; without {', '.join(page['left_out'])}, which answer no whole text or picture" if page["left_out"] else ""
    tasks = f"{len(page['tasks'])} task{'s' * (len(page['tasks']) > 1)}"
    return f"{page['page']}: {tasks}, {page['bytes'] / 1e6:.1f} MB; open it in a browser{left}"
