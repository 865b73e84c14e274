"""A small random model of every family that is supported, with batches for it. For unit tests only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from conftest import padded_batches, tiny_bert, tiny_dinov2

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """How to make a model and batches, and how many blocks its stacks must have."""

    build: Callable[[], Any]
    batches: Callable[[], Batches]
    stacks: dict[str, int]


def image_batches() -> Batches:
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(3, 3, 28, 28, generator=generator)} for _ in range(2)]


def clip_batches() -> Batches:
    """Texts as long as an image has patches (5): by its shape, the text's mask would fit the images as well."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 31, (2, 5), generator=generator)
    ids[:, -1] = 31
    ids[0, 2] = 31  # the end-of-text token: what follows is padding
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    images = torch.randn(2, 3, 28, 28, generator=generator)
    return [{"input_ids": ids, "attention_mask": mask, "pixel_values": images}]


def seq2seq_batches() -> Batches:
    """Sources and targets with padding of their own; once they are equally long, and only the masks differ."""
    targets = padded_batches(3)[::-1]
    batches = [
        {**source, "decoder_input_ids": target["input_ids"], "decoder_attention_mask": target["attention_mask"]}
        for source, target in zip(padded_batches(3), targets)
    ]
    source = {"input_ids": torch.full((2, 4), 7), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    target_mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    return [*batches, {**source, "decoder_input_ids": torch.full((2, 4), 9), "decoder_attention_mask": target_mask}]


def text_model(config_class: Any, model_class: Any, **settings: Any) -> Any:
    """A small model from the names that most configs share."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return model_class(config_class(**{**sizes, **settings})).eval()


def decoder(name: str, **settings: Any) -> Callable[[], Any]:
    """A small decoder with grouped-query attention, such as `Llama`."""
    kinds = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    return lambda: text_model(*kinds, **{"num_key_value_heads": 2, **settings})


def gemma3() -> Any:
    kinds = transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM
    return text_model(*kinds, num_key_value_heads=2, head_dim=16, sliding_window=4)


def roberta() -> Any:
    return text_model(transformers.RobertaConfig, transformers.RobertaModel, max_position_embeddings=40)


def distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=32, dim=64, hidden_dim=96, n_layers=2, n_heads=4)
    return transformers.DistilBertModel(config).eval()


def vit() -> Any:
    return text_model(transformers.ViTConfig, transformers.ViTModel, image_size=28, patch_size=14)


def t5(gated: bool) -> Callable[[], Any]:
    """T5 as it was (ReLU, one embedding for everything), or as in FLAN-T5 (gated GELU, an output layer of its own)."""
    form = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {}

    def build() -> Any:
        config = transformers.T5Config(
            vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **form
        )
        return transformers.T5ForConditionalGeneration(config).eval()

    return build


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4)).eval()


def clip_config() -> transformers.CLIPConfig:
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    heads = {"num_attention_heads": 4}
    return transformers.CLIPConfig(text_config={**text, **heads, "eos_token_id": 31}, vision_config={**vision, **heads})


def clip() -> Any:
    return transformers.CLIPModel(clip_config()).eval()


def clip_vision() -> Any:
    return transformers.CLIPVisionModel(clip_config().vision_config).eval()


def bart() -> Any:
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        vocab_size=32, d_model=32, encoder_layers=2, decoder_layers=2, max_position_embeddings=32, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


FAMILIES: dict[str, Family] = {
    "bert": Family(tiny_bert, padded_batches, {"encoder.layer": 2}),
    "roberta": Family(roberta, padded_batches, {"encoder.layer": 2}),
    "distilbert": Family(distilbert, padded_batches, {"transformer.layer": 2}),
    "vit": Family(vit, image_batches, {"layers": 2}),
    "dinov2": Family(tiny_dinov2, image_batches, {"encoder.layer": 2}),
    "clip_vision": Family(clip_vision, image_batches, {"encoder.layers": 2}),
    "clip": Family(clip, clip_batches, {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2}),
    "t5": Family(t5(gated=False), seq2seq_batches, {"encoder.block": 2, "decoder.block": 2}),
    "flan_t5": Family(t5(gated=True), seq2seq_batches, {"encoder.block": 2, "decoder.block": 2}),
    "bart": Family(bart, seq2seq_batches, {"model.encoder.layers": 2, "model.decoder.layers": 2}),
    "llama": Family(decoder("Llama"), padded_batches, {"model.layers": 2}),
    "smollm2": Family(decoder("Llama", tie_word_embeddings=True), padded_batches, {"model.layers": 2}),
    "qwen2": Family(decoder("Qwen2"), padded_batches, {"model.layers": 2}),
    "qwen3": Family(decoder("Qwen3", head_dim=16), padded_batches, {"model.layers": 2}),
    "mistral": Family(decoder("Mistral", sliding_window=4), padded_batches, {"model.layers": 2}),
    "gemma": Family(decoder("Gemma", head_dim=16), padded_batches, {"model.layers": 2}),
    "gemma3": Family(gemma3, padded_batches, {"model.layers": 2}),
    "phi3": Family(decoder("Phi3"), padded_batches, {"model.layers": 2}),
    "gpt2": Family(gpt2, padded_batches, {"transformer.h": 2}),
}
