"""What an architecture is, and the sizes that tiny ones share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.kit import architecture_batches as batches
from tests.kit.architecture_batches import VOCABULARY

Settings = dict[str, Any]
SPECIAL: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER: Settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: Settings = {"vocab_size": VOCABULARY, **TOWER, **SPECIAL}
IMAGE: Settings = {**TOWER, "image_size": 28, "patch_size": 14}
GROUPED: Settings = {**TEXT, "num_key_value_heads": 2}
NARROW: Settings = {**GROUPED, "head_dim": 16}
# Encoder–decoders: with the names of T5, and with those of BART.
T5: Settings = {
    "vocab_size": VOCABULARY,
    **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    **{"pad_token_id": 0, "eos_token_id": 2},
}
BART: Settings = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{"max_position_embeddings": 32, **SPECIAL, "decoder_start_token_id": 0, "forced_eos_token_id": None},
}
WAVE: Settings = {
    **TOWER,
    **{"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    **{"vocab_size": VOCABULARY, "mask_time_prob": 0.0},
}
MIXTURE: Settings = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
CLIP_TOWER: Settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers at a tiny size.

    Attributes:
        kind: what goes in and comes out: `encoder`, `decoder`, `seq2seq`, `image`, `audio`, `speech`, `dual` (texts
            beside pictures) or `vision_language` (texts with pictures among their tokens).
        model: name of the class.
        config: name of its config's class.
        settings: of its config.
        batches: makes ready batches.
        positions: how many tokens a text may have at most; None where nothing ends.
    """

    kind: str
    model: str
    config: str
    settings: Settings
    batches: Callable[[], batches.Batches]
    positions: int | None = field(default=None)

    def make_config(self, **settings: Any) -> Any:
        """The config, with other or more settings."""
        return getattr(transformers, self.config)(**{**self.settings, **settings})

    def build(self, seed: int = 0, tied: bool | None = None, model: str | None = None, **settings: Any) -> Any:
        """A model with random weights, in eval mode.

        Args:
            seed: of the weights.
            tied: whether the config ties the output layer to the embeddings; None leaves it to the config's default.
            model: another class than the architecture's own.
            settings: of the config, beside its own.
        """
        config = self.make_config(**settings)
        if tied is not None:
            for part in {id(one): one for one in (config, config.get_text_config())}.values():
                part.tie_word_embeddings = tied
        torch.manual_seed(seed)
        return getattr(transformers, model or self.model)(config).eval()

    @property
    def has_output_layer(self) -> bool:
        """Whether there is an output layer of which the config says if it is tied to the embeddings."""
        return bool(getattr(getattr(transformers, self.model), "_tied_weights_keys", None))


def encoder(name: str, **settings: Any) -> Architecture:
    mask = settings.pop("mask", True)
    limit = settings.setdefault("max_position_embeddings", 64)
    return Architecture(
        "encoder", f"{name}Model", f"{name}Config", {**TEXT, **settings}, batches.texts(mask), limit if mask else None
    )


def decoder(name: str, model: str | None = None, mask: bool = True, **settings: Any) -> Architecture:
    return Architecture(
        "decoder", model or f"{name}ForCausalLM", f"{name}Config", {**TEXT, **settings}, batches.texts(mask)
    )


def grouped(name: str, **settings: Any) -> Architecture:
    return decoder(name, **{**GROUPED, "max_position_embeddings": 64, **settings})


def seq2seq(name: str, model: str = "", **settings: Any) -> Architecture:
    return Architecture(
        "seq2seq", model or f"{name}ForConditionalGeneration", f"{name}Config", settings, batches.seq2seq
    )


def image(name: str, size: int = 28, **settings: Any) -> Architecture:
    return Architecture("image", f"{name}Model", f"{name}Config", settings, batches.pictures(size))
