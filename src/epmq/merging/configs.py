"""Whether base and experts compute alike: their configs, field by field, as transformers understands them."""

import re
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from epmq.errors import InputError, error_context
from epmq.merging.experts import ExpertSet
from epmq.models.checkpoint import Checkpoint, read_config
from epmq.models.config import (
    ROPE,
    ConfigField,
    ConfigReads,
    changed,
    config_fields,
    is_config,
    read_as,
    transformers_config,
)

# What a fine-tune may have otherwise without a word: bookkeeping, what concerns its own head, what the tensors tell.
# fmt: off
_SILENT = {
    "dtype", "finetuning_task", "id2label", "label2id", "num_labels", "problem_type",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "vocab_size",
}
# What changes no result: how it is computed, and what is returned beside it.
_HARMLESS = {
    "chunk_size_feed_forward", "gradient_checkpointing", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "use_cache",
}
# fmt: on
# What plays a part in training alone, or is a matter of precision, which is float32 here.
_TRAINING = re.compile(
    "loss|initializer|init_std|init_value|jitter|label_smoothing|mask_(time|feature)_|spec_augment|fp32|upcast|flash"
)
# Ropes whose frequencies follow from the number of positions; for others it is no more than an announcement.
_BY_LENGTH = ("dynamic", "longrope")
# Fields that one message names.
NAMED = 8
CLOSED = "transformers cannot open this model"

Fields = dict[str, ConfigField]


def check_configs(experts: ExpertSet) -> None:
    """Check that the experts' configs say the same as the base's, where it changes what is computed.

    Fields whose difference cannot matter are named in a note; those that the recipe gives a value are departures.

    Raises:
        InputError: the expert, the fields and both values are named.
    """
    base = experts.base.checkpoint
    file = base.path / base.CONFIG
    content, config_class = read_config(file), type(experts.model.config)
    if experts.shares_part:
        with error_context(file, CLOSED):
            content = _part(transformers_config(base), config_class).to_dict()
    comparison = _Comparison(experts, content)
    comparison.check("base", content, file)
    for expert in experts.experts.values():
        if expert.adapter is None:
            file, theirs = expert.path / expert.checkpoint.CONFIG, read_config(expert.path / expert.checkpoint.CONFIG)
            part = part_of(experts.model.config, expert.checkpoint)
            # What a part of the model does not say is the base's.
            comparison.check(f"expert {expert.task}", theirs if part is None else {**content, part: theirs}, file)


def part_of(config: Any, checkpoint: Checkpoint) -> str | None:
    """Name of the sub-config of that class which describes all of a checkpoint; None where none does."""
    with error_context(checkpoint.path / checkpoint.CONFIG, CLOSED):
        own = type(transformers_config(checkpoint))
    return next((name for name, value in vars(config).items() if type(value) is own), None)


def _part(config: Any, part_class: type) -> Any:
    """The sub-config of that class, such as CLIP's of images; where there is none, the config itself."""
    return next((value for value in vars(config).values() if type(value) is part_class), config)


class _Comparison:
    """Holds configs against the base's, with the changes that the recipe asks for."""

    def __init__(self, experts: ExpertSet, content: dict[str, Any]) -> None:
        self._notes, self._model, self._changes = experts.notes, experts.model, experts.changes
        self._class, self._is_part = type(experts.model.config), experts.shares_part
        self._ours = self._fields(changed(content, self._class, self._changes))

    @cached_property
    def _reads(self) -> ConfigReads:
        return ConfigReads(self._model)

    def _fields(self, content: dict[str, Any]) -> Fields:
        return config_fields(read_as(self._class, content))

    def check(self, who: str, content: dict[str, Any], file: Path) -> None:
        """Check the content of one `config.json`; `who` and `file` are for messages."""
        with error_context(file, CLOSED):
            theirs = self._fields(content)
        differing = [name for name in {**self._ours, **theirs} if self._differs(name, theirs)]
        matters = [name for name in differing if self._matters(name, theirs)]
        if matters:
            with error_context(who):
                after = self._fields(changed(content, self._class, self._changes))
            left = [name for name in matters if self._differs(name, after)]
            if left:
                raise InputError(self._message(who, left, theirs, file))
            for name in matters:
                self._notes.depart(f"{who}: {self._values(name, theirs)}, as the recipe's config says")
        if len(differing) > len(matters):
            names = ", ".join(self._values(name, theirs) for name in differing if name not in matters)
            self._notes.append(f"{who}: differs in what changes no result of the merged model: {names}")

    def _differs(self, name: str, theirs: Fields) -> bool:
        """Whether a field differs; one that a config lacks is None."""
        one, other = (fields[name].value if name in fields else None for fields in (self._ours, theirs))
        field = self._ours.get(name) or theirs[name]
        old_name = field.name == ROPE and name.endswith(".type")  # of rope_type, which is there as well
        return one != other and field.name not in _SILENT and not old_name and not _belongs_below(field)

    def _matters(self, name: str, theirs: Fields) -> bool:
        """Whether a field that differs changes what is computed."""
        pair = [fields[name] for fields in (self._ours, theirs) if name in fields]
        field, leaf = pair[0], name.rpartition(".")[2]
        owners = [vars(one.owner) for one in pair]
        if field.name in _HARMLESS or _TRAINING.search(leaf):
            return False
        if "drop" in leaf and not any(isinstance(one.value, bool) for one in pair):  # a rate, not a switch
            return False
        if field.name == "is_encoder_decoder" and self._is_part:
            return False  # the base is one, and an encoder of it says that it is none
        if field.name == "pad_token_id":
            return self._reads.padding_counts_positions
        if field.name == "max_position_embeddings" and all(owner.get(ROPE) for owner in owners):
            return any(kind in _BY_LENGTH for owner in owners for kind in _rope_types(owner[ROPE]))
        if field.name == "sliding_window" and all(owner.get("layer_types") for owner in owners):
            return any("sliding" in kind for owner in owners for kind in owner["layer_types"])
        return self._reads.reads(field)

    def _message(self, who: str, names: list[str], theirs: Fields, file: Path) -> str:
        """What differs, first what the class takes as a field and not as what follows from one."""
        fields = self._ours | theirs
        known = [name for name in names if _is_taken(fields[name])]
        # What is read may follow from a field that is not read itself, such as T5's feed_forward_proj.
        taken = [name for name in theirs if self._differs(name, theirs) and _is_taken(fields[name])]
        sources = [] if known else taken
        listed = [*sources, *known, *(name for name in names if name not in known)]
        more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
        values = ", ".join(self._values(name, theirs) for name in listed[:NAMED])
        settings = ", ".join(f"config.{name}" for name in (sources or known or names)[:NAMED])
        return (
            f"{who}: {values}{more}; what they compute differs: to take one value for all, set {settings} in the "
            f"recipe or with --set ({file})"
        )

    def _values(self, name: str, theirs: Fields) -> str:
        one, other = (fields[name].value if name in fields else None for fields in (theirs, self._ours))
        where = "in what is merged" if self._changes else "in the base"
        return f"{name} is {one!r:.60} ({other!r:.60} {where})"


def _is_taken(field: ConfigField) -> bool:
    """Whether the config's class takes the field, so that it does not just follow from another."""
    return field.name in signature(type(field.owner)).parameters


def _belongs_below(field: ConfigField) -> bool:
    """Whether a field was left in a config from the time when its sub-config's fields stood there as well."""
    below = [value for value in vars(field.owner).values() if is_config(value)]
    return not _is_taken(field) and any(hasattr(one, field.name) for one in below)


def _rope_types(parameters: dict[str, Any]) -> list[Any]:
    """The kinds of rope in `rope_parameters`, which may have one for each type of layer."""
    return [value.get("rope_type") for value in (parameters, *parameters.values()) if isinstance(value, dict)]
