"""Models of transformers with linear layers in the place of fused experts, as a run has them."""

from __future__ import annotations

import copy
from typing import Any

from epmq.models.meta import rename
from epmq.models.mixtures import is_fused, unfuse
from epmq.models.pieces import piece_of


def with_layers(model: Any) -> Any:
    """The model itself where nothing is fused; else a copy whose experts have layers with the fused ones' weights."""
    if not any(is_fused(module) for module in model.modules()):
        return model
    fused, buffers = model.state_dict(), dict(model.named_buffers())
    made = unfuse(copy.deepcopy(model).to("meta"))
    found, extra = rename(made, fused)
    assert not extra
    made = made.to_empty(device="cpu")
    for name, tensor in buffers.items():
        made.get_buffer(name).copy_(tensor)
    for name, tensor in made.state_dict().items():
        piece = piece_of(found[name])
        tensor.copy_(fused[name] if piece is None else piece.take(fused[piece.tensor][piece.index]))
    return made
