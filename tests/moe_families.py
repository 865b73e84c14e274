"""A small random mixture of every kind, with the settings that make it one. For unit tests only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from families import text_model

EXPERTS = 4


def mixture(name: str, **settings: Any) -> Callable[[], Any]:
    """A small decoder whose blocks are mixtures of four experts, two a token, such as `Mixtral`."""
    kinds = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    return lambda: text_model(*kinds, **{**sizes, **settings})


SHARED = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": mixture("Mixtral", num_local_experts=EXPERTS),
    "qwen2_moe": mixture("Qwen2Moe", num_experts=EXPERTS, **SHARED),
    "qwen3_moe": mixture("Qwen3Moe", num_experts=EXPERTS, moe_intermediate_size=32, head_dim=8),
    "olmoe": mixture("Olmoe", num_experts=EXPERTS, intermediate_size=32),
    "gpt_oss": mixture("GptOss", num_local_experts=EXPERTS, intermediate_size=32, head_dim=8, sliding_window=4),
    "granite": mixture("GraniteMoe", num_local_experts=EXPERTS),
    "deepseek_v3": mixture(
        "DeepseekV3",
        n_routed_experts=EXPERTS,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        **LATENT,
    ),
}
