"""Checkpoints on disk: read lazily, tensor by tensor; written shard by shard into a directory that appears whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What is fetched from the Hub: never code, and pickles only where the user names one.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Weights in pickles, which are opened only by name and only as tensors (`torch.load(weights_only=True)`).
PICKLES = (".bin", ".bin.index.json")
# Files beside the weights that belong to the tokenizer or the processor.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
# Bytes that are copied at once.
COPIED = 1 << 24
# Bytes of tensors that are held in memory before they are written.
PART_BYTES = 1 << 25
# A shard of an output is full when it holds this much.
SHARD_BYTES = 4 << 30
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
# What the header of a safetensors file says of a tensor: its dtype, as safetensors calls it, and its shape.
Form = tuple[str, tuple[int, ...]]


def resolve(source: str | Path) -> Path:
    """The local directory of a model: `source` itself, or a snapshot of the Hub id `owner/name`.

    Where `source` names a pickle (`directory/pytorch_model.bin` or `owner/name/pytorch_model.bin`, or the index of
    several), the path of that file is returned.

    Raises:
        FileNotFoundError: there is no such directory and no such model on the Hub.
    """
    path = Path(source).expanduser()
    pickled = str(source).endswith(PICKLES)
    if path.is_dir() or (pickled and path.is_file()):
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)" + (r"/([\w.-]+)" if pickled else "()"), str(source))
    if not found:
        raise FileNotFoundError(f"{source}: no such directory (and not a Hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [*PATTERNS, "*.bin"] if pickled else PATTERNS
        return Path(snapshot_download(found[1], allow_patterns=patterns)) / found[2]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{source}: no such directory, and the Hub did not give it ({reason})") from None


class _Pickled:
    """Tensors of a pickle, behind the interface of `safe_open`."""

    def __init__(self, path: Path) -> None:
        # The form before torch 1.6, which older models on the Hub still have, is no zip file and cannot be mapped.
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(str(error) or type(error).__name__) from None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError("it holds something else than named tensors")
        self._tensors: dict[str, Tensor] = content

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> _Pickled._Header:
        return self._Header(self._tensors[name])

    class _Header:
        def __init__(self, tensor: Tensor) -> None:
            self._tensor = tensor

        def get_shape(self) -> list[int]:
            return list(self._tensor.shape)

        def get_dtype(self) -> str:
            kinds = {dtype: kind for kind, dtype in {**_DTYPES, **_INTEGERS, "BOOL": torch.bool}.items()}
            return kinds.get(self._tensor.dtype, str(self._tensor.dtype).removeprefix("torch."))


class Checkpoint:
    """A Hugging Face directory, read lazily: opening it reads headers only.

    Args:
        source: directory or Hub id; or, by name, a `pytorch_model.bin` (a pickle) or its index.

    Attributes:
        path: the local directory.
        config: content of `config.json`.

    Raises:
        FileNotFoundError: no directory, no `config.json` or no weights; the path is named.
        ValueError: a file cannot be read as what it should be; it is named.
    """

    CONFIG, SINGLE, INDEX = "config.json", SINGLE, INDEX

    def __init__(self, source: str | Path) -> None:
        path = resolve(source)
        self.path = path.parent if str(source).endswith(PICKLES) else path
        self.config: dict[str, Any] = _read_json(self.path / self.CONFIG)
        self._files: dict[str, Any] = {}
        named = path.name if path != self.path else None
        self._shard: dict[str, str] = self._read_index(named)

    def _read_index(self, named: str | None) -> dict[str, str]:
        index = self.path / (named if named and named.endswith(".json") else self.INDEX)
        if named and not named.endswith(".json"):
            return dict.fromkeys(self._open(named).keys(), named)
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index}: no 'weight_map'")
            for name, shard in shards.items():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise ValueError(f"{index}: tensor {name!r} lies in {shard!r}, which is not a plain file name")
                if shard.endswith(PICKLES) and not named:
                    raise ValueError(f"{index}: {shard} is a pickle")
                if not (self.path / shard).exists():
                    raise FileNotFoundError(f"{self.path / shard}: named in {index.name} but missing")
            listed = {name: file for file in sorted(set(shards.values())) for name in self._open(file).keys()}
            for name, shard in shards.items():
                if listed.get(name) != shard:
                    raise ValueError(f"{index}: tensor {name!r} is not in {shard}")
            return shards
        if (self.path / self.SINGLE).exists():
            return dict.fromkeys(self._open(self.SINGLE).keys(), self.SINGLE)
        pickles = [file.name for file in sorted(self.path.glob("*.bin*")) if file.name.endswith(PICKLES)]
        named_pickle = next((name for name in reversed(pickles) if "model" in name), None)
        hint = f" ({named_pickle} is a pickle: name that file to have it opened)" if named_pickle else ""
        raise FileNotFoundError(f"{self.path}: no {self.SINGLE} and no {self.INDEX}{hint}")

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            try:
                if shard.endswith(PICKLES):
                    self._files[shard] = _Pickled(self.path / shard)
                else:
                    self._files[shard] = safe_open(str(self.path / shard), framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                kind = "pickle of tensors" if shard.endswith(PICKLES) else "safetensors file"
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"{self.path / shard}: not a readable {kind} ({reason})") from None
        return self._files[shard]

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as on disk."""
        return list(self._shard)

    def __contains__(self, name: str) -> bool:
        return name in self._shard

    def _slice(self, name: str) -> Any:
        if name not in self._shard:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        return self._open(self._shard[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """What safetensors calls a tensor's dtype, such as `F32` or `I32`."""
        return self._slice(name).get_dtype()

    def dtype(self, name: str) -> torch.dtype | None:
        """Float dtype of a tensor, from the header; None for any other kind."""
        return _DTYPES.get(self.kind(name))

    def form(self, name: str) -> Form:
        """Dtype, as safetensors calls it, and shape of a tensor, from the header."""
        return self.kind(name), self.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is no tensor of that name.
        """
        return self._read(name)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, along its first dimension.

        Raises:
            KeyError: there is no tensor of that name.
        """
        return self._read(name, rows)

    def _read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._shard:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        shard = self._shard[name]
        if shard.endswith(PICKLES):
            tensor = self._open(shard).get_tensor(name)
            return tensor if rows is None else tensor[rows]
        # A map for this tensor alone: pages that were read stay resident until their map is closed, and with one map
        # for the file all weights would be in the end.
        file = safe_open(str(self.path / shard), framework="pt")
        return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def check_finite(self, names: list[str] | None = None) -> None:
        """Read all tensors once and look for NaN and Inf.

        Raises:
            ValueError: a tensor has one; file and tensor are named.
        """
        for name in self.names if names is None else names:
            tensor = self._read(name)
            if not is_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ValueError(f"{self.path / self._shard[name]}: tensor {name!r} has {bad} NaN or Inf entries")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf; integers never have."""
    if not torch.is_floating_point(tensor) or not tensor.numel():
        return True
    # Smallest and largest entry show them without a copy of the tensor, which a sum in float64 takes.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


class CheckpointWriter:
    """Writes tensors as they come, in small parts, and puts the parts together into shards at the end.

    Args:
        folder: an existing directory.
        shard_bytes: a shard is full when it holds this much.
        part_bytes: so much is held in memory at most, beside one tensor.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, part_bytes: int = PART_BYTES) -> None:
        self.folder, self.shard_bytes, self.part_bytes = folder, shard_bytes, min(part_bytes, shard_bytes)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[Path]] = []  # each with its parts
        self._shard_bytes = shard_bytes
        self._parts = 0
        self.sizes: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor.

        Raises:
            ValueError: the name was written before.
        """
        if name in self.sizes:
            raise ValueError(f"tensor {name!r} is written twice")
        self.sizes[name] = tensor.numel() * tensor.element_size()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += self.sizes[name]
        if self._pending_bytes >= self.part_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._shard_bytes >= self.shard_bytes:
            self._shards.append([])
            self._shard_bytes = 0
        part = self.folder / f"part-{self._parts}"
        save_file(self._pending, str(part), metadata={"format": "pt"})
        self._shards[-1].append(part)
        self._shard_bytes += self._pending_bytes
        self._parts += 1
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write the last part and put the shards together and, if there are several, their index."""
        self._flush()
        files = shard_files(len(self._shards))
        names = [join(parts, self.folder / file) for parts, file in zip(self._shards, files)]
        write_index(self.folder, dict(zip(files, names)), sum(self.sizes.values()))


def shard_files(count: int) -> list[str]:
    """What the files of a checkpoint in so many shards are called."""
    several = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [SINGLE] if count == 1 else several


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of a checkpoint in several shards; one file needs none.

    Args:
        folder: where the shards are.
        shards: file → names of its tensors.
        total: bytes of all tensors.
    """
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def join(parts: Sequence[Path], target: Path) -> list[str]:
    """Make one safetensors file of several, which vanish; their bytes are copied and not interpreted.

    Args:
        parts: safetensors files with different tensors.
        target: the file to write.

    Returns:
        the tensors' names.
    """
    if len(parts) == 1:
        parts[0].rename(target)
        with safe_open(str(target), framework="pt") as whole:
            return list(whole.keys())
    forms: dict[str, Form] = {}
    places: dict[str, tuple[Path, int]] = {}
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        forms |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        places |= {name: (part, 8 + length + entry["data_offsets"][0]) for name, entry in entries.items()}
    header, names = make_header(forms)
    with target.open("wb") as out, ExitStack() as stack:
        files = {part: stack.enter_context(part.open("rb")) for part in parts}
        out.write(header)
        for name in names:
            part, begin = places[name]
            files[part].seek(begin)
            for left in range(byte_size(forms[name]), 0, -COPIED):
                out.write(files[part].read(min(left, COPIED)))
    for part in parts:
        part.unlink()
    return names


def make_header(forms: Mapping[str, Form]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file, and its tensors' names in the order in which their bytes follow."""
    # The order that the format asks for, so that every tensor is aligned: by falling size of the numbers, then by name.
    names = sorted(forms, key=lambda name: (-_bits(forms[name][0]), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + byte_size(forms[name])
        entries[name] = {"dtype": forms[name][0], "shape": forms[name][1], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, names


def byte_size(form: Form) -> int:
    """Bytes of a tensor in a file."""
    dtype, shape = form
    return prod(shape) * _bits(dtype) // 8


def _bits(dtype: str) -> int:
    """Of one number of a safetensors dtype, such as BF16 or F8_E4M3."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8  # BOOL


def check_output(path: str | Path) -> Path:
    """Where an output directory may appear.

    Raises:
        FileExistsError: something is there already.
        PermissionError: the parent cannot be written to.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise FileExistsError(f"output {path} exists already: remove it or choose another directory")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"output {path}: {parent} cannot be written to")
    return path


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A work folder that becomes `path` when the `with` block ends well, and vanishes when it does not.

    Raises:
        FileExistsError, PermissionError: see `check_output`.
    """
    path = check_output(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        yield work
        publish(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, path: Path) -> None:
    """Make a finished folder appear as `path`, when all in it is on the disk.

    Raises:
        FileExistsError, PermissionError: see `check_output`.
    """
    for file in work.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    work.chmod(0o755)
    check_output(path)
    work.rename(path)


def copy_processor(source: Path, target: Path) -> None:
    """Copy tokenizer and processor files, as they are."""
    for name in PROCESSOR_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, content: object) -> None:
    """Write JSON with two spaces of indentation."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content
