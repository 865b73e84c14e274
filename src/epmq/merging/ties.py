"""Which tensors are one and the same in a checkpoint, as its own config, class and file say."""

from typing import Any, Protocol

import torch
from torch import Tensor

from epmq.errors import error_context
from epmq.models.checkpoint import Checkpoint, architecture_of
from epmq.models.classes import config_of, outline
from epmq.models.meta import is_generator, tied_names

# Fields of a config by which a class decides what it ties.
_FIELDS = ("tie_word_embeddings", "tie_encoder_decoder", "share_encoder_decoder_embeddings")
# Fields that say how a tied output layer is computed with; T5's config makes the second one of the first.
_COMPUTED = ("tie_word_embeddings", "scale_decoder_outputs")


class Reader(Protocol):
    """The base or an expert."""

    stored: dict[str, str]

    def tensor(self, name: str) -> Tensor: ...


def own_ties(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint's own config ties among a model's tensors: name → the name it follows.

    A checkpoint of another model type, or of a class without an output layer, says nothing: the model's own.
    """
    architecture = architecture_of(checkpoint.config)
    if checkpoint.config.get("model_type") != model.config.model_type or not is_generator(architecture or ""):
        return tied_names(model)
    config = config_of(checkpoint)
    if _choices(config.to_dict()) == _choices(model.config.to_dict()):
        return tied_names(model)
    with error_context(checkpoint.path / checkpoint.CONFIG, "transformers cannot build this model"):
        return tied_names(outline(type(model), config, checkpoint))


def _choices(config: dict[str, Any]) -> dict[str, Any]:
    own = {name: config[name] for name in _FIELDS if name in config}
    return own | {name: _choices(value) for name, value in config.items() if isinstance(value, dict)}


def follow_ties(stored: dict[str, str], tied: dict[str, str]) -> None:
    """Let names that a file lacks stand for the tensor that they are tied to, whichever of its names that one has.

    Both arguments are from name to name: in the model → on disk, and what follows → what it follows. What the file
    holds of its own stays, as in `from_pretrained`.
    """
    groups: dict[str, list[str]] = {}
    for name, leader in tied.items():
        groups.setdefault(leader, [leader]).append(name)
    for group in groups.values():
        held = next((stored[name] for name in group if name in stored), None)
        if held is not None:
            for name in group:
                stored.setdefault(name, held)


def is_one(reader: Reader, name: str, leader: str) -> bool:
    """Whether two tensors of the base or of an expert are one and the same, or equal.

    What adapters give is rounded otherwise for the one than for the other.
    """
    if reader.stored.get(name) == reader.stored.get(leader):
        return True
    one, other = reader.tensor(name), reader.tensor(leader)
    if getattr(reader, "adapter", None) is None:
        return torch.equal(one, other)
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), atol=1e-6)


def asked_fields(model: Any) -> list[str]:
    """Fields on ties by which a model's own forward computes otherwise, as T5 scales what a tied output layer gets."""
    forward: Any = type(model).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return [name for name in _COMPUTED if name in forward.__code__.co_names]
