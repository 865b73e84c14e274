"""Whole models from disk: by `from_pretrained`, with packed weights unpacked first."""

import copy
import io
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError, error_context
from epmq.models.checkpoint import Checkpoint, architecture_of
from epmq.models.meta import empty_model, matrices_on_disk, named_class, no_larger, rename
from epmq.models.mixtures import OWN, mixtures
from epmq.models.origins import Origins
from epmq.models.pieces import piece_of

# Formats of compressed-tensors that are unpacked here, and what they call the tensors of a weight.
FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")
LEAVES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
# Field of a `quantization_config` that names the layers whose modules store [in, out], such as GPT-2's `Conv1D`; codes
# are [out, in] all the same. compressed-tensors and transformers let it be.
TRANSPOSED = "transposed"


def load_model(path: str | Path, config: dict[str, Any], **settings: Any) -> Any:
    """`from_pretrained` with the class that the checkpoint's config names.

    Packed weights are unpacked first: transformers (5.23) cannot load packed models of which it converts tensors on
    load, such as DINOv2, and the rest it would unpack in the first forward.
    """
    import transformers

    checkpoint = Checkpoint(path)
    model_class: Any = named_class(architecture_of(config)) or transformers.AutoModel
    settings = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True, **settings}
    quantization = config.get("quantization_config") or {}
    bounds = no_larger(checkpoint.path / checkpoint.CONFIG, len(checkpoint.names), checkpoint.bits)
    with error_context(path, "transformers cannot load this model"), bounds:
        if quantization.get("format") not in FORMATS:
            return model_class.from_pretrained(path, **settings).eval()
        readers = plain_tensors(checkpoint, quantization, stored_dtype(config))
        state, plain = {name: read() for name, read in readers.items()}, plain_config(path)
        if any(OWN.search(name) for name in state) and model_class is not transformers.AutoModel:
            # Building a model writes a dtype into its config; `bounds` hold for this one as well.
            fuse_experts(empty_model(model_class, copy.deepcopy(plain), nullcontext()), state)
        settings |= {"config": plain, "state_dict": state, "output_loading_info": True}
        model, found = model_class.from_pretrained(None, **settings)
        unread = [name for name in found["unexpected_keys"] if name not in checkpoint]  # made of codes
        if unread and found["missing_keys"]:  # which would be random
            raise InputError(f"{unread[0]} is read by no layer of {model_class.__name__}")
        model.eval()
        take_generation_settings(model, checkpoint.path)
        return model


def fuse_experts(model: Any, state: dict[str, Tensor]) -> None:
    """Fuse in place what transformers does not fuse itself: matrices of experts that it never writes as such.

    Args:
        model: of the class that the state is of, with linear layers for experts.
        state: tensors by their names on disk.
    """
    made, converted = rename(model, state)[0], matrices_on_disk(model)
    origins = Origins(mixtures(model), [], [])
    for name, (mixture, _) in origins.fused.items():
        pieces = {layer: piece_of(piece) for layer, piece in origins.of(name, name, None).items()}
        if any(layer in converted or made.get(layer) not in state for layer in pieces):
            continue
        shape = mixture.fused_shapes()[name.rpartition(".")[2]]
        fused = torch.empty(shape, dtype=state[made[next(iter(pieces))]].dtype)
        for layer, piece in pieces.items():
            assert piece is not None and piece.index is not None
            piece.take(fused[piece.index]).copy_(state.pop(made[layer]))
        state[name] = fused


def plain_config(path: str | Path) -> Any:
    """The config of a packed checkpoint, without what says how it is packed."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    del config.quantization_config
    return config


def take_generation_settings(model: Any, path: Path) -> None:
    """Let a model that was not loaded from a folder generate as that folder's `generation_config.json` says."""
    import transformers

    file = path / "generation_config.json"
    if model.can_generate() and file.exists():
        with error_context(file, "transformers cannot read it"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)


def why_not_direct(path: str | Path, config: dict[str, Any], shapes_only: bool = False) -> str | None:
    """Why plain `from_pretrained` cannot open a checkpoint, or None if it can.

    With `shapes_only` nothing is computed, which takes no memory and finds less: not what goes wrong when it unpacks.

    transformers 5.21 to 5.23 refuse every pack-quantized model of which they split a tensor on load (DINOv2 is one,
    for the sake of its largest size); this is tried rather than listed, so that a mended version is noticed.
    """
    import transformers

    model_class: Any = named_class(architecture_of(config)) or transformers.AutoModel
    log: Any = transformers.utils.logging
    try:
        with redirect_stderr(io.StringIO()), ExitStack() as stack:  # the loader's progress bars, and its messages
            stack.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity(log.CRITICAL)
            place = {"device_map": "meta"} if shapes_only else {}
            _, found = model_class.from_pretrained(path, trust_remote_code=False, output_loading_info=True, **place)
    except (ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__} in transformers {transformers.__version__}"
    # It warns and takes random weights in the place of what it cannot unpack, such as a layer that is stored [in, out].
    unread = {
        name.rpartition(".")[0] for name in found["unexpected_keys"] if name.endswith((".weight_packed", ".weight"))
    }
    return f"{len(unread)} packed weights are not read by transformers {transformers.__version__}" if unread else None


def stored_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config says a model is computed in; None where it says none."""
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def plain_tensors(
    checkpoint: Checkpoint, quantization: dict[str, Any], dtype: torch.dtype | None = None
) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of a checkpoint, by name, with plain weights in the place of quantized ones.

    Args:
        quantization: the `quantization_config` of its config; empty where nothing is quantized.
        dtype: in which weights are made of codes and scales; None is that of the scales.
    """
    readers: dict[str, Callable[[], Tensor]] = {name: partial(checkpoint.tensor, name) for name in checkpoint.names}
    for name in checkpoint.names if quantization else ():
        layer, _, leaf = name.rpartition(".")
        if leaf in LEAVES and f"{layer}.weight_scale" in checkpoint:
            readers.pop(name)
            if f"{layer}.weight_packed" in checkpoint or f"{layer}.weight" in checkpoint:  # else another's, tied
                readers[f"{layer}.weight"] = partial(unpacked_weight, checkpoint, layer, quantization, dtype)
    return readers


def unpacked_weight(
    checkpoint: Checkpoint, layer: str, quantization: dict[str, Any], dtype: torch.dtype | None = None
) -> Tensor:
    """The plain weight of one quantized layer as its module stores it, by compressed-tensors' own code.

    It is computed in `dtype`, as transformers does, which casts the scales when it loads them; None is their own.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = group_of(layer, quantization)
    compressor = BaseCompressor.get_value_from_registry(group.get("format") or quantization["format"])
    packed = {leaf: checkpoint.tensor(f"{layer}.{leaf}") for leaf in LEAVES if f"{layer}.{leaf}" in checkpoint}
    packed["weight_scale"] = packed["weight_scale"].to(dtype)
    weight: Tensor = compressor.decompress(packed, QuantizationScheme.model_validate(group))["weight"]
    return weight.T.contiguous() if layer in quantization.get(TRANSPOSED, ()) else weight


def group_of(layer: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """The config group of a layer by its name on disk: the one that names it, else the one of all linear layers."""
    groups: list[dict[str, Any]] = list(quantization["config_groups"].values())
    named = [group for group in groups if layer in group["targets"]]
    return (named or groups)[0]
