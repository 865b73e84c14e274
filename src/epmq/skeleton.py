"""The model without its weights: which class it is, what its tensors are called, and how they get in and out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.checkpoint import Checkpoint

# Classes whose weights are all shared between experts: their own architecture is merged. Everything else that is not
# a plain `…Model` has a task head; its backbone is merged and the head is kept apart.
_WHOLE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def model_class(config: Any, architecture: str | None) -> Any:
    """The transformers class of the part that experts share.

    Args:
        config: a transformers config.
        architecture: first entry of `architectures` in the base's config.
    """
    import transformers

    if architecture and architecture.endswith(("Model", *_WHOLE)):
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    return transformers.MODEL_MAPPING[type(config)]


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint with parameters on the meta device and real buffers, in eval mode.

    Raises:
        ValueError: transformers does not know the model type, or knows it through remote code only.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        kind = model_class(config, (checkpoint.config.get("architectures") or [None])[0])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint.path / 'config.json'}: transformers cannot open this model ({error})") from None
    with init_empty_weights(include_buffers=False):
        return kind._from_config(config).eval()


def rename(model: Any, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """What a checkpoint calls the tensors of a model.

    transformers renames tensors when it loads (old layouts, prefixes of task classes); its own table is applied, so
    that any checkpoint that `from_pretrained` reads is read here too.

    Args:
        model: the skeleton.
        stored: names on disk, perhaps with a prefix or with a task head's tensors among them.

    Returns:
        name in the model → name on disk, and the names on disk that the model does not have.

    Raises:
        ValueError: transformers would convert (fuse, split, permute) a tensor on load; it is named.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    extra: list[str] = []
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise ValueError(f"tensor {name!r} is converted by transformers on load, which epmq does not do yet")
        if renamed in state:
            found[renamed] = name
        else:
            extra.append(name)
    return found, extra


def tied_names(model: Any) -> dict[str, str]:
    """Tensors that share another one's storage: name → the name it follows."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return dict(tied) if getattr(model.config, "tie_word_embeddings", True) else {}


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a real tensor in the place of a parameter or buffer (which may be on the meta device)."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def drop_tensors(module: nn.Module) -> None:
    """Send a block's parameters back to the meta device, which frees their memory."""
    for child in module.modules():
        for leaf, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def load_model(path: str | Path, config: dict[str, Any], **settings: Any) -> Any:
    """`from_pretrained` with the class that the checkpoint's config names."""
    import transformers

    architecture = (config.get("architectures") or ["AutoModel"])[0]
    kind = getattr(transformers, architecture, transformers.AutoModel)
    return kind.from_pretrained(path, **settings).eval()
