"""Fine-tunes of tiny models, and how far two models are apart, told by transformers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names of what models give that their user reads.
READ = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output", "text_embeds", "image_embeds")


def fine_tuned(model: Any, base: Any, seed: int, size: float = 0.01) -> Any:
    """Make of `model` a stand-in for a fine-tune of `base`: its weights, each moved a little.

    What is tied in `model` stays so; an output layer of its own that `base` ties starts as a copy.
    """
    start = base.state_dict()
    model.load_state_dict({name: start[name] for name in model.state_dict() if name in start}, strict=False)
    generator = torch.Generator().manual_seed(seed)
    own = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    with torch.no_grad():
        for tensor in own.values():
            noise = torch.randn(tensor.shape, generator=generator)
            # A running variance stays positive.
            tensor.add_(size * (noise.abs() if (tensor > 0).all() else noise).to(tensor.dtype))
    return model


@torch.no_grad()
def read(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a user reads off a model's outputs, by name, in float32."""
    outputs = model(**batch)
    found = {name: outputs[name].float() for name in READ if isinstance(outputs.get(name), Tensor)}
    return found or {"first": outputs[0].float()}


def gap(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry; infinite where shapes differ or something is not finite."""
    if found.shape != wanted.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)) if wanted.numel() else 0.0


def gaps(found: Any, wanted: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """The largest gap between two models' outputs on some batches, by the outputs' names."""
    largest = dict[str, float]()
    for batch in batches:
        here, there = read(found, batch), read(wanted, batch)
        for name in here.keys() | there.keys():
            apart = gap(here[name], there[name]) if name in here and name in there else float("inf")
            largest[name] = max(largest.get(name, 0.0), apart)
    return largest


def different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> list[str]:
    """Names of the tensors that only one side has, or that are apart by more than so much."""
    one_sided = found.keys() ^ wanted.keys()
    apart = {
        name for name in found.keys() & wanted.keys() if gap(found[name].float(), wanted[name].float()) > tolerance
    }
    return sorted(one_sided | apart)
