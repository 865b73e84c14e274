"""What lies beside the weights of a base and goes into the output: tokenizer, processor, generation, pooling.

No file is listed by name: all that is not something else is taken.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epmq.errors import InputError
from epmq.files import read_json

# The modules of a sentence-transformers model, in the order in which they run; each has a folder.
MODULES, CONFIG = "modules.json", "config.json"
# Endings of files that are something else. Weights of any library, pickles and archives, which may hold any of them:
# fmt: off
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".gguf", ".ggml", ".h5", ".msgpack", ".ot",
    ".tflite", ".mlmodel", ".mlpackage", ".pb", ".pdparams", ".npz", ".npy", ".pkl", ".pickle", ".joblib", ".zip",
    ".tar", ".gz", ".xml",
)
# Code, data, logs, pages and pictures.
OTHERS = (
    ".py", ".pyc", ".so", ".sh", ".cpp", ".cu", ".ipynb", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".log",
    ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".mp3", ".wav", ".flac", ".yaml", ".yml",
    ".toml", ".lock", ".draft", ".md5", ".sha256",
)
# fmt: on
# Names of files that describe weights, a training or an earlier run: the output has its own, or none.
DESCRIPTIONS = re.compile(
    r"config\.json|report\.json|params\.json|adapter_.*|README.*|.*\.index(\..*)?\.json|.*quant\w*_config\.json"
    r"|trainer_state.*|training_args.*|\w*_results\.json|events\.out\..*",
    re.IGNORECASE,
)
# A file that is larger than this is none of a tokenizer.
LARGEST = 1 << 26


def side_files(folder: Path, processor: Any = None) -> dict[str, Path]:
    """The files of a base that belong into an output made of it, by their path in the folder.

    All plain files at the top that are not weights, code, data, pages or descriptions of those; of folders, those of
    sentence-transformers' modules with their weights, those of the parts of a joint `processor`, and those that hold
    no weights, no other model and nothing that lies at the top.
    """
    files = [file for file in sorted(folder.iterdir()) if belongs(file)]
    parts: list[str] = getattr(type(processor), "get_attributes", list)()
    top = {file.name for file in files}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and (child.name in parts or _is_whole(child, top)):
            files += [file for file in sorted(child.rglob("*")) if belongs(file) or file.name == CONFIG]
    for module in modules(folder):
        files += [file for file in sorted(module.rglob("*")) if is_plain(file) and not file.name.endswith(OTHERS)]
    return {file.relative_to(folder).as_posix(): file for file in files}


def _is_whole(folder: Path, top: set[str]) -> bool:
    """Whether all files of a folder belong into the output: it is none of another model, of data or of a training."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    config = folder / CONFIG
    if any(file.name in top or not (belongs(file) or file == config) for file in files):
        return False
    return not config.exists() or "model_type" not in read_json(config)


def belongs(file: Path) -> bool:
    """Whether a file is neither weights nor code nor a description of those."""
    return (
        is_plain(file)
        and not file.name.lower().endswith((*WEIGHTS, *OTHERS))
        and not DESCRIPTIONS.fullmatch(file.name)
        and file.stat().st_size <= LARGEST
    )


def is_plain(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def modules(folder: Path) -> list[Path]:
    """The folders of sentence-transformers' modules beside the model itself, in the order in which they run.

    Raises:
        InputError: `modules.json` is not what it should be, names a folder outside, or a second model.
    """
    file = folder / MODULES
    if not file.exists():
        return []
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
    entries = listed if isinstance(listed, list) else list(listed.values()) if isinstance(listed, dict) else [None]
    found = []
    for entry in entries:
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise InputError(f"{file}: each module needs a path inside the folder, found {entry!r:.100}")
        if path in ("", "."):  # the model itself
            continue
        if (folder / path / CONFIG).exists() and "model_type" in read_json(folder / path / CONFIG):
            raise InputError(f"{file}: the model lies in {path}: give that folder as the base")
        found.append(folder / path)
    return found


def copy_files(files: dict[str, Path], folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy `side_files` into a folder, but for those with the endings `leave_out`."""
    for name, file in files.items():
        if not name.endswith(leave_out):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def add_modules(files: dict[str, Path], base: Path, experts: Mapping[str, Path]) -> Iterator[str]:
    """Add sentence-transformers' modules that experts have and the base lacks; notes say where one is not the output's.

    Args:
        files: `side_files` of the base.
        experts: task → folder.
    """
    own, theirs = _modules(base), {task: _modules(path) for task, path in experts.items()}
    for name, module in own.items():
        config = module / CONFIG
        sizes = read_json(config) if config.exists() else {}
        if {"in_features", "out_features"} <= sizes.keys() and not any(module.glob("*model*")):
            yield f"{name} of {MODULES} has no weights in {base}: the output opens in no sentence-transformers"
    first = next(iter(theirs.values()), {})
    if not own and first and all(_same(first, modules) for modules in theirs.values()):
        path = next(iter(experts.values()))
        names = [MODULES, *(file.name for file in path.glob("*sentence*.json"))]
        files |= {name: path / name for name in names if name not in files}
        for module in first.values():
            files |= {file.relative_to(path).as_posix(): file for file in sorted(module.rglob("*")) if is_plain(file)}
        yield f"{', '.join(first)}, which the base lacks, are those of the experts, in which they are the same"
        return
    for task, modules in theirs.items():
        for name, module in modules.items():
            if name not in own:
                yield f"expert {task} has a module {name} that the base lacks; the output has none"
            elif not _same({name: module}, {name: own[name]}):
                yield f"expert {task} has another module {name} than the base, whose own is the output's"


def _modules(folder: Path) -> dict[str, Path]:
    """sentence-transformers' modules that are there, by name."""
    return {module.name: module for module in modules(folder) if module.is_dir()}


def _same(one: dict[str, Path], other: dict[str, Path]) -> bool:
    return one.keys() == other.keys() and all(_contents(one[name]) == _contents(other[name]) for name in one)


def _contents(module: Path) -> dict[str, Any]:
    """What a module's files hold; JSON by its values, whatever its spaces."""
    found = dict[str, Any]()
    for file in sorted(module.rglob("*")):
        if is_plain(file):
            found[file.name] = read_json(file) if file.suffix == ".json" else file.read_bytes()
    return found
