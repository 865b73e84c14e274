"""Which tokens are real: padding must never enter a moment."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from epmq.models.blocks import is_padding_mask

# Padding masks of a batch, in the order in which they are asked for the tokens that come out of a model.
MASKS = ("decoder_attention_mask", "attention_mask")
NOTHING: Mapping[str, Any] = {}


def padding_mask(arguments: dict[str, Any], inputs: Tensor, given: Mapping[str, Any] = NOTHING) -> Tensor | None:
    """Which tokens of a layer's inputs are real: booleans [batch, tokens], or None if all are.

    The stack's own padding mask, or the encoder's where the inputs are the encoder's output (cross-attention).
    Flattened inputs [batch·tokens, in] are recognised too, and [batch, 1, tokens, in]. `arguments` are those of the
    part that holds the stack, and `given` those of the whole model, whose padding mask counts where the part gets what
    was made of it, as in Gemma 3.
    """
    states = arguments.get("encoder_hidden_states")
    crossing = isinstance(states, Tensor) and states.data_ptr() == inputs.data_ptr()
    mask = arguments.get("encoder_attention_mask" if crossing else "attention_mask")
    made = isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim > 2)
    if made and not any(name.startswith("decoder_") for name in given):
        mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or not is_padding_mask(mask):
        return None
    fits = tuple(mask.shape) == tuple(inputs.shape[:-1]) or (inputs.ndim == 2 and mask.numel() == len(inputs))
    if fits or tuple(inputs.shape[:-1]) == (len(mask), 1, mask.shape[1]):  # one head, as of latent attention
        mask = mask.bool()
        return None if bool(mask.all()) else mask
    return None


def real_tokens(inputs: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Which of a model's outputs [batch, tokens] are of real tokens: booleans of that shape; None if all are."""
    for name in MASKS:
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and is_padding_mask(mask) and mask.shape == torch.Size(shape):
            return None if bool(mask.all()) else mask.bool()
    return None
