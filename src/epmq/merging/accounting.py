"""Every tensor of base and experts is merged, kept in a head, or named: in a note on what is left out, or an error."""

from collections.abc import Sequence

from epmq.errors import InputError, error_context
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import BaseReader, ExpertReader
from epmq.merging.ties import asked_fields, is_one
from epmq.models import classes
from epmq.models.checkpoint import Checkpoint, architecture_of
from epmq.models.meta import has_task_head, named_class

# Names that a note lists before it counts the others.
LISTED = 4


def account_for_base(experts: ExpertSet) -> list[str]:
    """Note what the base lacks; the names on disk of what it has and is not merged.

    Raises:
        InputError: no class of transformers reads a tensor of the base; it is named.
    """
    base, notes = experts.base, experts.notes
    left = _left_over(experts, base, "the base")
    taken = [name for name in base.stand_ins if name not in experts.initial]
    if taken:
        notes.depart(f"not in the base, the mean of the experts' takes its place: {listed(taken)}")
    started = [name for name in base.stand_ins if name in experts.initial and name not in experts.computed]
    if started:
        notes.depart(f"not in the base, what its class starts with takes its place: {listed(started)}")
    absent = [name for name in experts.absent if name not in experts.computed]
    if absent:
        notes.depart(f"not in the base, left out: {', '.join(absent)}")
    return left


def note_left_out(experts: ExpertSet, left: Sequence[str]) -> None:
    """Note what of the base, as `account_for_base` gives it, is in no adapter's head either."""
    heads = [expert.adapter_head for expert in experts.experts.values()]
    used = {name for head in heads if head is not None for name in head.read}
    names = [name for name in left if name not in used]
    if names:
        experts.notes.depart(f"in the base, left out: {listed(names)}")


def account_for_expert(experts: ExpertSet, expert: ExpertReader) -> None:
    """As `account_for_base`, of an expert that is a whole checkpoint; its task's head is kept, and is not left out."""
    who, notes = f"expert {expert.task}", experts.notes
    left = _left_over(experts, expert, who)
    architecture = architecture_of(expert.checkpoint.config)
    if not left:
        if has_task_head(architecture) and expert.head_file is None and expert.head_config is None:
            notes.depart(f"{who}: {architecture} has a head, but there is none in its file ({expert.path})")
        return
    if _is_unknown_task(expert.checkpoint):
        notes.depart(f"{who}: transformers has no class {architecture}, its head is left out")
    elif expert.head_file is not None:
        notes.depart(f"{who}: {expert.head_file.name} takes the place of its own {listed(left)}")
    else:
        if expert.head_config is not None:
            left = _unread_by(named_class(architecture), expert.checkpoint, left, who)
        if left:
            notes.depart(f"{who}: left out, since the merged model has none: {listed(left)}")
    expert.left_out += left


def note_ties(experts: ExpertSet) -> None:
    """Say where base and experts disagree on what is one tensor: it is two in the output.

    Raises:
        InputError: the model computes otherwise where its output layer is tied, so that both cannot be right.
    """
    base = experts.base
    for expert in experts.experts.values():
        if expert.adapter is None:
            _check_computed(experts, expert)
        for name, leader in base.ties.items():
            if name not in experts.tied and is_one(base, name, leader) and not is_one(expert, name, leader):
                experts.notes.append(f"{name} is {leader} in the base, another in expert {expert.task}: they are two")
        for name, leader in expert.ties.items():
            one = name in expert.stored and is_one(expert, name, leader)
            if one and not (name in base.ties and is_one(base, name, leader)):
                experts.notes.append(f"{name} is {leader} in expert {expert.task}, another in the base: they are two")


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_computed(experts: ExpertSet, expert: ExpertReader) -> None:
    fields = asked_fields(experts.model)
    ours, theirs = experts.model.config, classes.config_of(expert.checkpoint) if fields else None
    for field in fields:
        if field not in experts.changes and getattr(ours, field, None) != getattr(theirs, field, None):
            raise InputError(
                f"expert {expert.task}: {field} is {getattr(theirs, field, None)}, but {getattr(ours, field, None)} in "
                f"the base, and {type(experts.model).__name__} computes otherwise by it ({expert.path})"
            )


def _left_over(experts: ExpertSet, reader: BaseReader | ExpertReader, who: str) -> list[str]:
    """Names on disk of weights that the merged model does not have: those of heads, and of parts that are not merged.

    Masks and counters of older versions are noted.

    Raises:
        InputError: a tensor belongs to what is merged but is not in the merged model, or no class reads it.
    """
    checkpoint, model = reader.checkpoint, experts.model
    left = classes.unread(model, reader.extra)
    weights = [name for name in left if classes.is_weight(checkpoint, name)]
    stray = [name for name in weights if _is_inside(experts, name)]
    if stray:
        more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
        raise InputError(f"{who}: tensor {stray[0]!r}{more} has no counterpart in the base ({checkpoint.path})")
    unknown = _read_by_none(checkpoint, left, who) if left else []
    odd = [name for name in unknown if name in weights]
    if odd and not _is_unknown_task(checkpoint):
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise InputError(
            f"{who}: tensor {odd[0]!r}{more} is of no {checkpoint.config.get('model_type')} model of transformers; "
            f"take it out or rename it ({checkpoint.path})"
        )
    marks = [name for name in unknown if name not in weights]
    if marks:
        experts.notes.append(f"{who}: no weights, left out: {listed(marks)}")
    return [name for name in left if name not in marks]


def _is_unknown_task(checkpoint: Checkpoint) -> bool:
    """Whether a config names a class with a task head that transformers does not have."""
    architecture = architecture_of(checkpoint.config)
    return has_task_head(architecture) and named_class(architecture) is None


def _is_inside(experts: ExpertSet, name: str) -> bool:
    """Whether a tensor's name on disk lies in a part that the merged model has."""
    model = experts.model
    parts = {child for module in (model, model.base_model) for child, _ in module.named_children()}
    return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in parts


def _read_by_none(checkpoint: Checkpoint, names: list[str], who: str) -> list[str]:
    """Those of some names on disk that no class of transformers reads; a checkpoint's own class must be buildable."""
    own, config = named_class(architecture_of(checkpoint.config)), classes.config_of(checkpoint)
    if own is not None:
        names = _unread_by(own, checkpoint, names, who)
    for one in classes.related_classes(config, own):
        names = classes.unread_by(one, config, checkpoint, names) if names else names
    return names


def _unread_by(own: type, checkpoint: Checkpoint, names: list[str], who: str) -> list[str]:
    with error_context(f"{who}: the config of {own.__name__}", "transformers cannot build it"):
        return classes.unread(classes.outline(own, classes.config_of(checkpoint), checkpoint), names)
