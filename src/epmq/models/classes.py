"""Which class of transformers a checkpoint is of, and which of its tensors that class reads."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from epmq.errors import InputError, error_context
from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import FLOATS, Checkpoint, architecture_of
from epmq.models.config import transformers_config
from epmq.models.meta import backbone_class, has_task_head, is_generator, named_class, no_larger, rename
from epmq.models.mixtures import unfuse


def config_of(checkpoint: Checkpoint) -> Any:
    """As `transformers_config`; an InputError names the file."""
    with error_context(checkpoint.path / checkpoint.CONFIG, "transformers cannot open this model"):
        return transformers_config(checkpoint)


def outline(model_class: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """A model of a class with nothing allocated: names and shapes alone."""
    bounds = no_larger(checkpoint.path / checkpoint.CONFIG, len(checkpoint.names), checkpoint.bits)
    with bounds, torch.device("meta"):
        return unfuse(model_class._from_config(config, dtype=torch.float32))


def related_classes(config: Any, named: Any = None) -> list[Any]:
    """All classes of transformers for a config, in the order in which its module lists them."""
    start = named or backbone_class(config)
    module = sys.modules[start.__module__] if start is not None else None
    found = [named_class(name) for name in getattr(module, "__all__", [])]
    found = [one for one in found if one is not None and not one.__name__.endswith("PreTrainedModel")]
    return [one for one in found if one.config_class is type(config)]


def unread(model: Any, names: Iterable[str]) -> list[str]:
    """Names on disk that a model does not read, without the buffers that its class knows to be in older files."""
    _, extra = rename(model, names)
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    ends = {".".join(name.split(".")[-2:]) for name in computed}
    leaves = ("position_ids", "inv_freq")  # in older files, in every layer or under another module
    known = {leaf for leaf in leaves if any(name.endswith(leaf) for name in computed)}

    def passed_over(name: str) -> bool:
        parts = name.split(".")
        return ".".join(parts[-2:]) in ends or parts[-1] in known or any(p.search(name) for p in patterns)

    return [name for name in extra if not passed_over(name)]


def unread_by(model_class: Any, config: Any, checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """As `unread`, by a class of which there is no model yet; one that does not fit the config reads nothing."""
    try:
        return unread(outline(model_class, config, checkpoint), names)
    except Exception:  # what a class may raise on a config that it was not made for
        return names


def is_expected_missing(model: Any, name: str) -> bool:
    """Whether a class says that checkpoints need not hold a tensor: it is computed, or counts."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    if any(re.search(pattern, name) for pattern in patterns) or name in (model._keys_to_ignore_on_save or ()):
        return True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return name not in parameters or not parameters[name].requires_grad


def is_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor may be a weight: a mask, a counter or a single number is none."""
    dtype, shape = checkpoint.spec(name)
    return dtype in FLOATS and shape != (1,) and shape != ()


def missing(model: Any, names: Iterable[str]) -> list[str]:
    """Tensors of a model that are on disk under none of their names."""
    stored, tied = rename(model, names)[0], model.all_tied_weights_keys
    groups: dict[str, set[str]] = {}
    for name in model.state_dict():
        groups.setdefault(tied.get(name, name), set()).add(name)
    absent = [leader for leader, group in groups.items() if not group & stored.keys()]
    return [name for name in absent if not is_expected_missing(model, name)]


def fitting_classes(checkpoint: Checkpoint, config: Any) -> list[Any]:
    """The classes that read all weights of a checkpoint and miss the fewest of their own; generators come first."""
    names = _weights(checkpoint)
    fitting = list[tuple[tuple[int, int], Any]]()
    for one in related_classes(config):
        try:
            model = outline(one, config, checkpoint)
            if not _masks_instead(one, config) and not unread(model, names) and _has_shapes(model, checkpoint):
                fitting.append(((len(missing(model, names)), -len(rename(model, names)[0])), one))
        except Exception:  # as in `unread_by`
            continue
    best = [one for rank, one in fitting if rank == min(rank for rank, _ in fitting)]
    return sorted(best, key=lambda one: not is_generator(one.__name__))


def _has_shapes(model: Any, checkpoint: Checkpoint) -> bool:
    state = model.state_dict()
    return all(checkpoint.shape(name) == state[key].shape for key, name in rename(model, checkpoint.names)[0].items())


def _masks_instead(model_class: Any, config: Any) -> bool:
    """Whether a class is the decoder that an encoder's config does not ask for, such as `BertLMHeadModel`."""
    import transformers

    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return causal is model_class and masked not in (None, model_class) and not getattr(config, "is_decoder", False)


def name_class(checkpoint: Checkpoint, must: bool) -> str | None:
    """Write down in a checkpoint's config which class it is of, where that names none that transformers has.

    It is found from the tensors. A class with a task head that transformers lacks stays, and so does one that nothing
    fits. Returns what was found, in words; None where nothing was to be done.

    Raises:
        InputError: several classes with a task head fit, and it `must` be known which.
    """
    named = architecture_of(checkpoint.config)
    if checkpoint.config.get("quantization_config") or (has_task_head(named) and named_class(named) is None):
        return None
    config = config_of(checkpoint)
    own = named_class(named)
    if own is not None and (not _is_plain(own) or not unread_by(own, config, checkpoint, _weights(checkpoint))):
        return None
    found = fitting_classes(checkpoint, config)
    if own is not None:
        found = [one for one in found if is_generator(one.__name__)]
    if not found:
        return None
    if must and len(found) > 1 and has_task_head(found[0].__name__):
        names = ", ".join(one.__name__ for one in found)
        raise InputError(f"its tensors fit {names}: name the one that it is in architectures")
    checkpoint.config["architectures"] = [found[0].__name__]
    return f"config.json names {named or 'no class'}; by its tensors it is a {found[0].__name__}"


def _weights(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.names if is_weight(checkpoint, name)]


def _is_plain(model_class: Any) -> bool:
    """Whether a class is a plain `…Model` without an output layer."""
    return not has_task_head(model_class.__name__) and not is_generator(model_class.__name__)


def shared_checkpoint(base: Checkpoint, experts: Sequence[Checkpoint]) -> Checkpoint:
    """The checkpoint whose `config.json` describes what base and experts share: the base.

    The exception are experts that are all one part of the base, which is then merged alone: those of the model type of
    one of the base's sub-configs, such as `CLIPVisionModel`s of a `CLIPModel`, and those of a class that has not all of
    the base's stacks of blocks, such as encoders of encoder–decoders.
    """
    types = {expert.config.get("model_type") for expert in experts}
    parts = [part.get("model_type") for part in base.config.values() if isinstance(part, dict)]
    if len(types) != 1:
        return base
    if types == {base.config.get("model_type")}:
        return experts[0] if _is_half(base, experts) else base
    return experts[0] if types <= set(parts) else base


def _is_half(base: Checkpoint, experts: Sequence[Checkpoint]) -> bool:
    """Whether all experts are of one plain class that has fewer stacks of blocks than the base's."""
    names = {architecture_of(expert.config) for expert in experts}
    named, own = named_class(next(iter(names))), named_class(architecture_of(base.config))
    if len(names) != 1 or None in (named, own) or named is own or not _is_plain(named):
        return False
    return _stacks(named, experts[0]) < _stacks(own, base)


def _stacks(model_class: Any, checkpoint: Checkpoint) -> int:
    with error_context(checkpoint.path / checkpoint.CONFIG, "transformers cannot build this model"):
        return len(find_stacks(outline(model_class, config_of(checkpoint), checkpoint)))


def shared_class(shared: Checkpoint, experts: Sequence[Checkpoint]) -> Any:
    """The class at which base and experts are merged.

    Where the checkpoint that describes what they share generates text, or all are plain models, that one's. Where some
    experts have an output layer that its class lacks, theirs: it would be lost. Otherwise its backbone.
    """
    config = config_of(shared)
    named = named_class(architecture_of(shared.config))
    if named is not None and is_generator(named.__name__):
        return named
    classes = [named_class(architecture_of(expert.config)) for expert in experts]
    with_output = [one for one in classes if one is not None and is_generator(one.__name__)]
    with_output = [one for one in dict.fromkeys(with_output) if one.config_class is type(config)]
    if with_output:
        return with_output[0]
    return named if named is not None and _is_plain(named) else backbone_class(config)
