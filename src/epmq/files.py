"""Files and folders that appear whole or not at all, and what is read of plain files: JSON, YAML, hashes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from epmq.errors import InputError, MissingError, OutputDeniedError, OutputExistsError, reason

# Bytes of a file that are hashed at once.
HASHED = 1 << 22
# Far more values than any YAML file of ours has.
MOST_VALUES = 100_000


def cache_dir() -> Path:
    """`$EPMQ_CACHE`, by default `~/.cache/epmq`."""
    return Path(os.environ.get("EPMQ_CACHE") or Path.home() / ".cache" / "epmq")


def check_output(path: str | Path) -> Path:
    """Where an output directory may appear.

    Raises:
        OutputExistsError: something is there already.
        OutputDeniedError: the parent cannot be written to.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise OutputExistsError(f"output {path} exists already: remove it or choose another directory")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise OutputDeniedError(f"output {path}: {parent} cannot be written to")
    return path


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A work folder that becomes `path` when the `with` block ends well, and vanishes when it does not.

    Errors as in `check_output`.
    """
    path = check_output(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        with named_in_errors(folder):
            yield folder
            publish(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def named_in_errors(folder: Path) -> Iterator[None]:
    """Let an error of the system that names no file, such as a full disk, name the folder that was written to."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def publish(folder: Path, path: Path) -> None:
    """Make a finished folder appear as `path`, when all in it is on the disk; errors as in `check_output`."""
    folder.chmod(0o755)
    for file in [*folder.rglob("*"), folder]:
        if file.is_file():
            file.chmod(0o644)
        sync(file)
    check_output(path)
    folder.rename(path)
    with suppress(OSError):  # it is there, and whole; only a power cut right now could still undo the rename
        sync(path.absolute().parent)


def sync(path: Path) -> None:
    """See a file, or the names in a folder, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there with all of its content or not at all, even after a power cut."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_bytes(content)
        sync(draft)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # what lies there half may be what fills the disk
        raise
    sync(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write JSON with two spaces of indentation."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MissingError, InputError: there is none; the file is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # half a character cannot be written again
    except FileNotFoundError:
        raise MissingError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The YAML mapping in a file, which is to be `what`, such as `a recipe`.

    Raises:
        MissingError, InputError: there is none; the file is named.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such file ({what})")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {what} is a mapping of fields")
    return content


def parse_yaml(text: str) -> Any:
    """Plain values in YAML.

    Raises:
        InputError: it is not YAML, holds more than plain values, or so many aliases of aliases that a few lines stand
            for millions of values.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        pending, budget = [root], MOST_VALUES
        while pending:
            node, budget = pending.pop(), budget - 1
            if budget < 0:
                raise InputError(f"it stands for more than {MOST_VALUES} values")
            if isinstance(node, yaml.MappingNode):
                pending += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                pending += node.value
        return None if root is None else loader.construct_document(root)
    except Exception as error:  # a date that is none makes the reader raise AttributeError
        raise InputError(reason(error)) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED):
            digest.update(piece)
    return digest.hexdigest()


def differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """What differs between two values of JSON, each with its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after)):
            yield from differences(*pair, f"{name}[{index}]")
    elif before != after:
        long = any(isinstance(value, str) and len(value) == 64 for value in (before, after))
        yield name if long else f"{name}: {before} → {after}"
