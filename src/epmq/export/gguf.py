"""GGUF: one file for llama.cpp and all that stands on it, such as Ollama and LM Studio; every code is kept."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epmq.data.processors import load_processor
from epmq.errors import InputError
from epmq.export.gguf_blocks import SMALL, BlockType, block_type, pack_rows
from epmq.export.gguf_models import ENCODERS, FAMILIES, Names, complete, extra_tensors, row_order, stored_plain
from epmq.export.gguf_run import LENGTH, compare_embeddings, compare_next_tokens, try_loading
from epmq.export.gguf_tokens import Vocabulary, other_end, vocabulary
from epmq.export.target import Coded, Contents, Verified, refuse_grid
from epmq.files import read_json
from epmq.models.codes import CodedCheckpoint
from epmq.models.heads import load_head
from epmq.models.multitask import HEADS
from epmq.models.side_files import modules
from epmq.quantization.grid import QuantizedTensor

TITLE = "llama.cpp, Ollama and LM Studio: one GGUF file"
PACKAGES, EXTRA, RUNTIME = ("gguf",), "gguf", "xllamacpp"
TABLE, OUTPUT = "token_embd.weight", "output.weight"
PLAIN = ("F32", "F16", "BF16")
# What llama.cpp calls a file by the type of most of its weights, where that is not the type's own name.
FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M"}
POOLINGS = {"mean": "MEAN", "cls": "CLS"}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file.

    Attributes:
        kind: its type, as ggml calls it.
        shape: of its bytes, or of its numbers in float32.
        dtype: of these.
        parts: makes them, some rows at a time.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: type
    parts: Callable[[], Iterator[NDArray[Any]]]


def check(contents: Contents) -> None:
    """Refuse families, layers and tokenizers that llama.cpp does not have; see `epmq.export.target.Target`."""
    config = complete(contents.config)
    FAMILIES[config.model_type].fields(config)
    names = Names(config)
    rows = 0
    for layer, coded in contents.layers.items():
        stored = names.get(f"{layer}.weight")
        if stored is not None:
            _check_layer(layer, coded)
        rows = coded.shape[0] if stored == TABLE else rows
    for name, shape in contents.plain.items():
        rows = shape[0] if names.get(name) == TABLE else rows
    vocabulary(contents.processor, rows)


def _check_layer(layer: str, coded: Coded) -> None:
    """Refuse a layer whose weights no block type holds exactly."""
    grid, columns = coded.grid, coded.shape[1]
    if columns % SMALL:
        raise InputError(
            f"gguf cannot hold {layer} quantized: {SMALL} does not divide its {columns} input columns; leave it as it "
            f"is by quantize.overrides: [{{layers: '{layer}', skip: true}}]"
        )
    if block_type(grid, columns) is None:
        raise refuse_grid("gguf", layer, grid, f"bits: {grid.bits}, group_size: {grid.group_size}, symmetric: true")
    if not coded.half:
        raise InputError(
            f"gguf stores scales as float16, which does not hold the {coded.form.scale_name} scales of {layer} as they "
            "are: quantize.scale_dtype: float16"
        )


def write(source: CodedCheckpoint, folder: Path) -> list[Path]:
    """Write `model-TYPE.gguf`, where TYPE is that of most weights; see `epmq.export.target.Target`."""
    return [write_file(source, folder)]


def write_file(source: CodedCheckpoint, folder: Path, plain: bool = False) -> Path:
    """Write a checkpoint's file into a folder; `plain`: `model-f32.gguf`, all its weights in float32."""
    import gguf

    config = complete(source.config)
    entries = _entries(source, config, plain)
    if TABLE not in entries:
        raise InputError(f"{source.checkpoint.path}: there is no table of tokens")
    kind = _kind_of_most(entries)
    path, arch = folder / f"model-{kind.lower()}.gguf", FAMILIES[config.model_type].arch
    with closing(gguf.GGUFWriter(path, arch)) as writer:
        writer.add_type("model")
        writer.add_name(source.checkpoint.path.name)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_fields(writer, FAMILIES[config.model_type].fields(config), f"{arch}.")
        _add_vocabulary(writer, source, config, entries[TABLE])
        for name, entry in entries.items():
            size = int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize
            raw = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(name, entry.shape, np.dtype(entry.dtype), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries.values():
            writer.write_tensor_data(np.concatenate(list(entry.parts())))
    return path


def _entries(source: CodedCheckpoint, config: Any, plain: bool) -> dict[str, _Entry]:
    """Name in the file → tensor, in the order of the blocks' names on disk."""
    names, entries = Names(config), dict[str, _Entry]()
    for name in source.weights():
        stored, layer = names.get(name), name.removesuffix(".weight")
        if stored is None or stored in entries:  # a table under another name
            continue
        if layer in source.grids and not plain:
            kind, (rows, columns) = block_type(source.grids[layer], source.shape(layer)[1]), source.shape(layer)
            if kind is None:
                raise InputError(f"gguf cannot hold {layer} on its grid")
            width = columns // kind.weights * kind.bytes
            parts = partial(_coded_parts, source, config, layer, kind)
            entries[stored] = _Entry(kind.name, (rows, width), np.uint8, parts)
        else:
            entries[stored] = _plain_entry(partial(_read_plain, source, config, name, plain))
    for stored, tensor in extra_tensors(config).items():
        entries[stored] = _plain_entry(partial(_same, tensor))
    return entries


def _coded_parts(source: CodedCheckpoint, config: Any, layer: str, kind: BlockType) -> Iterator[NDArray[Any]]:
    """The blocks of a layer, its rows in the order in which llama.cpp wants them."""
    weight, order = source.codes(layer), row_order(config, f"{layer}.weight")
    if order is not None:
        codes, scale, zero = (part[order] for part in (weight.codes, weight.scale, weight.zero_point))
        weight = QuantizedTensor(codes, scale, zero, weight.grid, weight.dtype)
    if not weight.scale.half().to(weight.scale.dtype).equal(weight.scale):
        raise InputError(f"float16 does not hold the scales of {layer}: quantize.scale_dtype: float16")
    yield from pack_rows(weight, kind)


def _read_plain(source: CodedCheckpoint, config: Any, name: str, plain: bool) -> Tensor:
    tensor = stored_plain(config, name, source.tensor(name))
    return tensor.float() if plain else tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _plain_entry(read: Callable[[], Tensor]) -> _Entry:
    """A tensor in float32, float16 or bfloat16; numpy has no name for the last."""
    tensor = read()
    kinds = {torch.float16: ("F16", np.float16), torch.bfloat16: ("BF16", np.uint8)}
    kind, dtype = kinds.get(tensor.dtype, ("F32", np.float32))
    shape = tuple(tensor.shape) if kind != "BF16" else (*tensor.shape[:-1], 2 * tensor.shape[-1])

    def parts() -> Iterator[NDArray[Any]]:
        again = read()
        yield again.view(torch.uint8).numpy() if kind == "BF16" else again.numpy().astype(dtype)

    return _Entry(kind, shape, dtype, parts)


def _kind_of_most(entries: Mapping[str, _Entry]) -> str:
    """The type of most that is quantized, of tables only if it is nothing else; else that of most matrices."""
    sizes = Counter[tuple[bool, bool, str]]()
    for name, entry in entries.items():
        if len(entry.shape) > 1:
            coded = entry.kind not in PLAIN
            sizes[coded, coded and name not in (TABLE, OUTPUT), entry.kind] += int(np.prod(entry.shape))
    return max(sizes, key=lambda key: (*key[:2], sizes[key]))[2]


def _add_fields(writer: Any, fields: Mapping[str, Any], prefix: str) -> None:
    """Add settings by the types of their values."""
    for name, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(prefix + name, value)
        elif isinstance(value, int):
            writer.add_uint32(prefix + name, value)
        elif isinstance(value, float):
            writer.add_float32(prefix + name, value)
        elif isinstance(value, str):
            writer.add_string(prefix + name, value)
        else:
            writer.add_array(prefix + name, list(value))


def _add_vocabulary(writer: Any, source: CodedCheckpoint, config: Any, table: _Entry) -> None:
    """Add the tokenizer, and what an encoder does with its tokens' features."""
    import gguf

    folder, rows = source.checkpoint.path, table.shape[0]
    words: Vocabulary = vocabulary(load_processor(folder), rows)
    writer.add_tokenizer_model(words.model)
    if words.tokens:
        writer.add_token_list(words.tokens)
        writer.add_token_types(words.kinds)
    else:
        writer.add_uint32(f"{FAMILIES[config.model_type].arch}.vocab_size", rows)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    _add_fields(writer, words.settings | other_end(folder, words.settings), "tokenizer.")
    if config.model_type in ENCODERS:
        writer.add_token_type_count(getattr(config, "type_vocab_size", None) or 1)
        pooling = pooling_of(folder)
        if pooling is not None:
            writer.add_pooling_type(gguf.PoolingType[POOLINGS[pooling]])


def pooling_of(folder: Path) -> str | None:
    """How an encoder's folder says that features become one: as sentence-transformers, or as all its heads."""
    for module in modules(folder):
        settings = read_json(module / "config.json") if (module / "config.json").exists() else {}
        for name, pooling in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")):
            if settings.get(name):
                return pooling
    heads = sorted((folder / HEADS).glob("*.safetensors")) if (folder / HEADS).is_dir() else []
    found = {getattr(load_head(head), "pooling", None) for head in heads}
    return next((name for name in POOLINGS if found == {name}), None)


def verify(folder: Path, source: Path, examples: Sequence[dict[str, Any]]) -> Verified:
    """Run the file in llama.cpp; see `epmq.export.target.Target` and `epmq.export.gguf_run`."""
    path = next(folder.glob("model-*.gguf"))
    config = complete(read_json(source / "config.json"))
    context: Any = FAMILIES[config.model_type].fields(config)["context_length"]
    length = min(LENGTH, context - 1)
    if config.model_type in ENCODERS:
        return compare_embeddings(path, source, examples, length)
    if config.model_type == "t5" or load_processor(source) is None:
        return try_loading(path)
    return compare_next_tokens(path, source, examples, length)
