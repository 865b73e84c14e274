"""Checkpoints on disk, read lazily: tensor by tensor."""

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from epmq.errors import InputError, MissingError, error_context, reason
from epmq.files import read_json
from epmq.models.parts import unwrapped, wrappers
from epmq.models.pieces import Piece, piece_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Endings of the files of a model that are fetched and read, which are those of all tokenizers of transformers: never
# code, and pickles only where the user names one.
# fmt: off
MODEL_FILES = (
    ".json", ".safetensors", ".txt", ".model", ".jinja", ".spm", ".codes", ".tiktoken", ".tokenizer", ".vocab", ".bpe",
)
# fmt: on
HUB_PATTERNS = [f"*{ending}" for ending in MODEL_FILES]
# Weights in pickles, which are opened only by name and only as tensors (`torch.load(weights_only=True)`).
PICKLES = (".bin", ".bin.index.json")
# Fields of a config that say how many there are of something, and more than any model has.
COUNTS, MOST = ("layers", "n_layer", "num_labels", "depth"), 100_000
# Dtypes by the names that safetensors gives them, in the order in which it writes their tensors.
# fmt: off
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}
# fmt: on
# Those that are computed with.
FLOATS = ("F64", "F32", "BF16", "F16")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What the header of a safetensors file says of a tensor: its dtype, as safetensors calls it, and its shape.
TensorSpec = tuple[str, tuple[int, ...]]


def byte_size(spec: TensorSpec) -> int:
    """Bytes of a tensor in a file."""
    dtype, shape = spec
    bits = re.search(r"\d+", dtype)  # of one number; BOOL names none and has 8
    return prod(shape) * (int(bits[0]) if bits else 8) // 8


def count_parameters(specs: Iterable[TensorSpec]) -> int:
    """Parameters in plain tensors; what is no float, such as positions, is none."""
    return sum(prod(shape) for dtype, shape in specs if dtype in FLOATS)


def bits_per_weight(size: int, parameters: int | None) -> float | None:
    """Bits a parameter of a whole model whose tensors take `size` bytes; None where the parameters are not known."""
    return 8 * size / parameters if parameters else None


def model_files(folder: Path) -> list[Path]:
    """The files of a model directory that are read, pickles included, by name."""
    return sorted(file for file in folder.iterdir() if file.name.endswith((*MODEL_FILES, ".bin")))


def resolve(source: str | Path) -> Path:
    """The local directory of a model: `source` itself, or a snapshot of the Hub id `owner/name`; else MissingError.

    Where `source` names a pickle in either, or the index of several, the path of that file is returned.
    """
    path = Path(source).expanduser()
    pickled = str(source).endswith(PICKLES)
    if path.is_dir() or (pickled and path.is_file()):
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)" + (r"/([\w.-]+)" if pickled else "()"), str(source))
    if not hub:
        raise MissingError(f"{source}: no such directory (and not a Hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [*HUB_PATTERNS, "*.bin"] if pickled else HUB_PATTERNS
        return Path(snapshot_download(hub[1], allow_patterns=patterns)) / hub[2]
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingError(f"{source}: no such directory, and the Hub did not give it ({reason(error)})") from None


class _Pickled:
    """Tensors of a pickle, behind the interface of `safe_open`."""

    def __init__(self, path: Path) -> None:
        # The form before torch 1.6, which older models on the Hub still have, is no zip file and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise InputError("it holds something else than named tensors")
        self._tensors: dict[str, Tensor] = content
        self.keys, self.get_tensor = content.keys, content.__getitem__

    def get_slice(self, name: str) -> Any:
        tensor = self._tensors[name]
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return SimpleNamespace(get_shape=lambda: list(tensor.shape), get_dtype=lambda: dtype)


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
        self.config: dict[str, Any] = read_config(self.path / self.CONFIG)
        self._files: dict[str, Any] = {}
        shard = self._read_index(path.name if path != self.path else None)
        self._on_disk = unwrapped(shard)
        self._shard = {name: shard[stored] for name, stored in self._on_disk.items()}

    def _read_index(self, named: str | None) -> dict[str, str]:
        if named and not named.endswith(".json"):
            return dict.fromkeys(self._open(named).keys(), named)
        index = self.path / (named or self.INDEX)
        if index.exists():
            return self._check_index(index, pickles=named is not None)
        if (self.path / self.SINGLE).exists():
            return dict.fromkeys(self._open(self.SINGLE).keys(), self.SINGLE)
        pickles = [file.name for file in sorted(self.path.glob("*.bin*")) if file.name.endswith(PICKLES)]
        pickle = next((name for name in reversed(pickles) if "model" in name), None)
        hint = f" ({pickle} is a pickle: name that file to have it opened)" if pickle else ""
        raise MissingError(f"{self.path}: no {self.SINGLE} and no {self.INDEX}{hint}")

    def _check_index(self, index: Path, pickles: bool) -> dict[str, str]:
        """Tensor name → shard, of all tensors in the shards; each is there and has what the index says."""
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: no 'weight_map'")
        for name, shard in shards.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise InputError(f"{index}: tensor {name!r} lies in {shard!r}, which is not a plain file name")
            if shard.endswith(PICKLES) and not pickles:
                raise InputError(f"{index}: {shard} is a pickle")
            if not (self.path / shard).exists():
                raise MissingError(f"{self.path / shard}: named in {index.name} but missing")
        listed = {name: shard for shard in sorted(set(shards.values())) for name in self._open(shard).keys()}
        for name, shard in shards.items():
            if listed.get(name) != shard:
                raise InputError(f"{index}: tensor {name!r} is not in {shard}")
        return shards | listed

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            path, pickled = self.path / shard, shard.endswith(PICKLES)
            with error_context(path, f"not a readable {'pickle of tensors' if pickled else 'safetensors file'}"):
                self._files[shard] = _Pickled(path) if pickled else safe_open(str(path), framework="pt")
        return self._files[shard]

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as on disk but for what programs that train put around modules."""
        return list(self._shard)

    @property
    def wrappers(self) -> list[str]:
        """What was taken off the names: modules of programs that train."""
        return wrappers(self._on_disk)

    @property
    def pickles(self) -> list[str]:
        """Names of the files with tensors that are pickles."""
        return sorted({shard for shard in self._shard.values() if shard.endswith(PICKLES)})

    @property
    def bits(self) -> int:
        """Size of all files with tensors: no tensor in them has more entries."""
        return 8 * sum((self.path / shard).stat().st_size for shard in set(self._shard.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._shard

    def _shard_of(self, name: str) -> str:
        if name not in self._shard:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        return self._shard[name]

    def spec(self, name: str) -> TensorSpec:
        """Dtype, as safetensors calls it, and shape of a tensor or a piece of one, from the header."""
        piece = piece_of(name)
        if piece is not None:
            dtype, whole = self.spec(piece.tensor)
            with error_context(str(self.path)):
                return dtype, piece.shape(whole)
        header = self._open(self._shard_of(name)).get_slice(self._on_disk[name])
        return header.get_dtype(), tuple(header.get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.spec(name)[1]

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor, from the header; None where it is none of `FLOATS`."""
        dtype = self.spec(name)[0]
        return DTYPES[dtype] if dtype in FLOATS else None

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor or a piece of one, or some rows, along its first dimension; there is none: a KeyError."""
        piece = piece_of(name)
        if piece is not None:
            return self._piece(piece, rows)
        shard, stored = self._shard_of(name), self._on_disk.get(name, name)
        if shard.endswith(PICKLES):
            pickled: Tensor = self._open(shard).get_tensor(stored)
            return pickled if rows is None else pickled[rows]
        # A map for this tensor alone: pages that were read stay resident until their map is closed, and with one map
        # for the file all weights would be in the end.
        with error_context(self.path / shard, f"tensor {name!r} cannot be read"):
            file: Any = safe_open(str(self.path / shard), framework="pt")
            tensor: Tensor = file.get_tensor(stored) if rows is None else file.get_slice(stored)[rows]
            return tensor

    def _piece(self, piece: Piece, rows: slice | None) -> Tensor:
        """A piece of a tensor, or some rows of it; of the whole only the entry is read that it lies in."""
        shard, stored = self._shard_of(piece.tensor), self._on_disk.get(piece.tensor, piece.tensor)
        with error_context(self.path / shard, f"tensor {piece.tensor!r} cannot be read"):
            pickled = shard.endswith(PICKLES)
            whole: Any = self._open(shard).get_tensor(stored) if pickled else None
            if whole is None:  # a map of its own, as above
                file: Any = safe_open(str(self.path / shard), framework="pt")
                whole = file.get_slice(stored)
            entry: Tensor = whole[:] if piece.index is None else whole[piece.index : piece.index + 1][0]
            own = piece.take(entry)
            return (own if rows is None else own[rows]).contiguous()

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read all tensors once, or those of that name; one that has NaN or Inf is an error, which names it."""
        for name in self.names if names is None else names:
            tensor = Checkpoint.tensor(self, name)  # by its name on disk, in an adapter too
            if not is_finite(tensor):
                bad = int((~torch.isfinite(tensor)).sum())
                piece = piece_of(name)
                shard = self._shard[name if piece is None else piece.tensor]
                raise InputError(f"{self.path / shard}: tensor {name!r} has {bad} NaN or Inf entries")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf; integers never have."""
    if not torch.is_floating_point(tensor) or not tensor.numel():
        return True
    # Smallest and largest entry show them without a copy of the tensor, which a sum in float64 takes.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_config(path: Path) -> dict[str, Any]:
    """The content of a `config.json`, with what is read here of the type that it should be, or an error."""
    config = read_json(path)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{path}: architectures must be a list of names, found {names!r:.100}")
    for field, expected in (("model_type", str), ("quantization_config", dict)):
        if not isinstance(config.get(field), expected | None):
            raise InputError(f"{path}: {field} must be a {expected.__name__}, found {config[field]!r:.100}")
    _check_counts(path, config)
    return config


def _check_counts(path: Path, config: dict[str, Any]) -> None:
    """Refuse counts so large that merely making the config, which lists layers and labels, would take for ever."""
    for field, value in config.items():
        if isinstance(value, dict):
            _check_counts(path, value)
        elif isinstance(value, int) and field.endswith(COUNTS) and value > MOST:
            raise InputError(f"{path}: {field} is {value}, which no model has")


def architecture_of(config: dict[str, Any]) -> str | None:
    """Name of the class that a config is of, if it says so."""
    names: list[str] = config.get("architectures") or []
    return names[0] if names else None
