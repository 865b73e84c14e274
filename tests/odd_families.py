"""Small models whose forward is not one call of every block, and experts of them on disk."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import perturbed
from torch import Tensor

from epmq.pipeline.prepare import PreparedRun, prepare
from epmq.recipe_file import load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def albert_config(layers: int = 4, groups: int = 2, **settings: Any) -> Any:
    """Groups of layers that are called layers / groups times each."""
    sizes = {**SIZES, "num_hidden_layers": layers, "num_hidden_groups": groups, "embedding_size": 32}
    return transformers.AlbertConfig(**sizes, max_position_embeddings=32, **settings)


def albert(layers: int = 4, groups: int = 2) -> Any:
    torch.manual_seed(0)
    return transformers.AlbertModel(albert_config(layers, groups)).eval()


def switch() -> Any:
    """A mixture whose experts are linear layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_experts": 4}
    sizes |= {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**sizes, expert_capacity=64, decoder_start_token_id=0)
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def llava() -> Any:
    """Images and texts; token 31 stands for an image's four."""
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 28, "patch_size": 14}
    del sizes["vocab_size"]
    vision, text = transformers.CLIPVisionConfig(**sizes), transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=31, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config).eval()


def token_batch(seed: int, rows: int = 3, length: int = 8) -> dict[str, Tensor]:
    """Texts without padding."""
    ids = torch.randint(3, 30, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_text_batch(seed: int) -> dict[str, Tensor]:
    """Texts that begin with an image."""
    batch = token_batch(seed)
    batch["input_ids"][:, :4] = 31
    return {**batch, "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed))}


def saved_recipe(folder: Path, build: Callable[[], Any], method: str = "gptq", **fields: Any) -> dict[str, Any]:
    """Base and two experts of a kind on disk."""
    base = build()
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        perturbed(copy.deepcopy(base), seed).save_pretrained(folder / name)
    experts = [{"name": name, "model": str(folder / name)} for name in ("one", "two")]
    quantize = {"method": method, "bits": 8}
    return {"base": str(folder / "base"), "experts": experts, "quantize": quantize, "format": "dequantized", **fields}


def prepared_run(
    folder: Path, build: Callable[[], Any], calibration: dict[str, Any], method: str, **quantize: Any
) -> PreparedRun:
    """A run over those that has been checked; `quantize` are more settings of the method."""
    recipe = saved_recipe(folder, build, method)
    recipe["quantize"] |= quantize
    return prepare(load_recipe(recipe), evaluate=False, calibration=calibration)
