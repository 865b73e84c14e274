"""The families of models that GGUF files are written of: their settings and tensors, as llama.cpp wants them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError

# Name of a setting within the file, without the architecture in front → value.
Fields = dict[str, int | float | bool | str | list[bool]]
# What llama.cpp computes for each activation it has: its GELU is the approximation by tanh, whatever it is called.
SILU, GELU, RELU = ("silu", "swish"), ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"), ("relu",)


@dataclass(frozen=True)
class Family:
    """What is particular of a family.

    Attributes:
        arch: name of the architecture in gguf.
        fields: its settings, by its config.
        activations: that llama.cpp computes it with.
        blocks: name of the config's field with the number of its blocks.
        inside: what the names of a model with a head have in front of those of its backbone.
        dropped: beginnings of names, without `inside`, of tensors that it has no use for.
    """

    arch: str
    fields: Callable[[Any], Fields]
    activations: tuple[str, ...]
    blocks: str = "num_hidden_layers"
    inside: str = "model."
    dropped: tuple[str, ...] = ()


def _common(config: Any) -> Fields:
    """Settings that all models of one stack have."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
    }


def _decoder(config: Any) -> Fields:
    """Llama's settings. A window that llama.cpp does not have limits the context: up to there it changes nothing."""
    size, rope = head_size(config), rope_of(config)
    window = config.max_position_embeddings if windowless(config) else config.sliding_window
    return {
        **_common(config),
        "context_length": min(config.max_position_embeddings, window),
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
        **_rope(rope),
    }


def _rope(rope: Mapping[str, Any]) -> Fields:
    """How positions turn queries and keys; an InputError names a way that is not supported."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(f"gguf cannot hold rope_type {kind}: supported are default, linear, llama3 and yarn")
    fields: Fields = {"rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return fields


def _phi3(config: Any) -> Fields:
    context = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return {**_decoder(config), "rope.scaling.original_context_length": context, "attention.sliding_window": 0}


def _gemma(config: Any) -> Fields:
    """Gemma's settings; from the second generation on with windows in some layers."""
    fields, kinds = _decoder(config), getattr(config, "layer_types", None)
    fields["context_length"] = config.max_position_embeddings
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            fields[name] = float(getattr(config, name))
    if kinds is None:
        return fields
    every = 2 if config.model_type == "gemma2" else 6
    windows = [kind == "sliding_attention" for kind in kinds]
    if windows != [(number + 1) % every != 0 for number in range(len(kinds))]:
        fields["attention.sliding_window_pattern"] = windows
    if config.model_type == "gemma2" and query_factor(config) != 1:
        raise InputError(f"gguf cannot hold query_pre_attn_scalar {config.query_pre_attn_scalar} of gemma2")
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local is not None:
        fields["rope.freq_base_swa"] = float(local["rope_theta"])
    return {**fields, "attention.sliding_window": config.sliding_window}


def _gpt2(config: Any) -> Fields:
    if config.scale_attn_by_inverse_layer_idx or config.add_cross_attention or not config.scale_attn_weights:
        raise InputError(
            "gguf cannot hold a gpt2 with scale_attn_by_inverse_layer_idx, add_cross_attention or scores "
            "that are not scaled"
        )
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def _bert(config: Any) -> Fields:
    fields: Fields = {"attention.layer_norm_epsilon": config.layer_norm_eps, "attention.causal": False}
    return {**_common(config), **fields, "context_length": config.max_position_embeddings - positions_before(config)}


def _distilbert(config: Any) -> Fields:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
    }


def _t5(config: Any) -> Fields:
    return {
        "context_length": getattr(config, "n_positions", 512),
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "decoder_block_count": config.num_decoder_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "decoder_start_token_id": config.decoder_start_token_id or 0,
    }


_ENCODER = ("pooler.", "embeddings.position_ids", "cls.", "lm_head.", "vocab_")
# `model_type` of a config → family.
FAMILIES = {
    "llama": Family("llama", _decoder, SILU),
    "mistral": Family("llama", _decoder, SILU),
    "qwen2": Family("qwen2", _decoder, SILU),
    "qwen3": Family("qwen3", _decoder, SILU),
    "gemma": Family("gemma", _gemma, GELU),
    "gemma2": Family("gemma2", _gemma, GELU),
    "gemma3_text": Family("gemma3", _gemma, GELU),
    "phi3": Family("phi3", _phi3, SILU),
    "gpt2": Family("gpt2", _gpt2, GELU, "n_layer", "transformer."),
    "bert": Family("bert", _bert, GELU, inside="bert.", dropped=_ENCODER),
    "roberta": Family("bert", _bert, GELU, inside="roberta.", dropped=_ENCODER),
    "distilbert": Family("bert", _distilbert, GELU, "n_layers", "distilbert.", _ENCODER),
    "t5": Family("t5", _t5, (*GELU, *RELU), "num_layers", ""),
}
ENCODERS = ("bert", "roberta", "distilbert")


def complete(content: Mapping[str, Any]) -> Any:
    """The config of a model by the content of its `config.json`, with its class's defaults.

    Raises:
        InputError: its family, or something about it, is not supported.
    """
    import transformers

    kind = str(content.get("model_type"))
    if kind not in FAMILIES:
        raise InputError(f"gguf: models of type {kind} are not supported; these are: {', '.join(FAMILIES)}")
    fields = {name: value for name, value in content.items() if name not in ("model_type", "quantization_config")}
    config = transformers.AutoConfig.for_model(kind, **fields)
    names = ("hidden_activation", "hidden_act", "activation_function", "activation", "dense_act_fn")
    found = next(value for name in names if (value := getattr(config, name, None)) is not None)
    if found not in FAMILIES[kind].activations:
        raise InputError(f"gguf: llama.cpp computes {kind} with {FAMILIES[kind].activations[0]}, not with {found}")
    return config


def head_size(config: Any) -> int:
    """Features of one head."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def rope_of(config: Any) -> dict[str, Any]:
    """How positions turn queries and keys where attention has no window."""
    found: dict[str, Any] = config.rope_parameters
    rope: dict[str, Any] = found.get("full_attention", found)
    return rope


def windowless(config: Any) -> bool:
    """Whether attention has no window."""
    used = getattr(config, "use_sliding_window", True)
    return not used or not getattr(config, "sliding_window", None)


def positions_before(config: Any) -> int:
    """Rows of RoBERTa's table of positions that no token has: it counts from after the padding."""
    return config.pad_token_id + 1 if config.model_type == "roberta" else 0


def query_factor(config: Any) -> float:
    """By what Gemma's queries have to be multiplied, as llama.cpp scales them by the head's size.

    Of the largest models it is the width by the number of heads, which it knows them by their number of blocks.
    """
    largest = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type) == config.num_hidden_layers
    scaled = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    return math.sqrt(scaled / config.query_pre_attn_scalar)


class Names:
    """The names that tensors have in the file.

    Args:
        config: as `complete` gives it.
    """

    def __init__(self, config: Any) -> None:
        import gguf

        self._family = FAMILIES[config.model_type]
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._family.arch)
        count = max(getattr(config, self._family.blocks), getattr(config, "num_decoder_layers", None) or 0)
        self._map = gguf.get_tensor_name_map(arch, count)

    def get(self, name: str) -> str | None:
        """The name in the file of a tensor by that on disk; None where it is left out.

        Raises:
            InputError: there is no place for it.
        """
        inside = self._family.inside
        short = name.removeprefix(inside)
        if short.startswith(self._family.dropped) or short.endswith((".attn.bias", ".masked_bias", "inv_freq")):
            return None
        shared = name.replace("encoder.embed_tokens", "shared").replace("decoder.embed_tokens", "shared")
        for candidate in (shared, short, inside + short):
            found: str | None = self._map.get_name(candidate, (".weight", ".bias"))
            if found is not None and not found.startswith("cls"):
                return found
        raise InputError(f"gguf: llama.cpp has no place for {name} in a model of architecture {self._family.arch}")


def row_order(config: Any, name: str) -> Tensor | None:
    """The order in which the rows of a tensor (by its name on disk) are stored; None is as they are.

    llama.cpp turns neighbouring features of Llama's queries and keys, where transformers turns those half a head apart.
    """
    layer = name.removesuffix(".weight").removesuffix(".bias")
    if FAMILIES[config.model_type].arch != "llama" or not layer.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
    rows = torch.arange(heads * head_size(config))
    return rows.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def stored_plain(config: Any, name: str, tensor: Tensor) -> Tensor:
    """A plain tensor as the file has it: vectors and small tables in float32, matrices in their own dtype."""
    order, kind = row_order(config, name), config.model_type
    tensor = tensor if order is None else tensor[order]
    if kind == "gpt2" and tensor.ndim == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        tensor = tensor.T
    if name.endswith("position_embeddings.weight"):
        tensor = tensor[positions_before(config) :]
    small = tensor.ndim == 1 or name.endswith(("wpe.weight", "_embeddings.weight", "relative_attention_bias.weight"))
    tensor = tensor.float() if small and not name.endswith("word_embeddings.weight") else tensor
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor.float() + 1
    if kind == "gemma3_text" and name.endswith("q_norm.weight"):
        tensor = tensor * query_factor(config)
    if kind == "t5" and name == "decoder.final_layer_norm.weight" and config.scale_decoder_outputs:
        tensor = tensor.float() * config.d_model**-0.5
    return tensor.contiguous()


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors that the file has and the checkpoint has not: by what Llama 3 slows each frequency down."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return {"rope_freqs.weight": plain / slowed.float()}
