"""Whether base and experts fit together, tensor by tensor; told from headers, before any compute."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from epmq.errors import InputError
from epmq.merging.accounting import account_for_base, account_for_expert, listed, note_left_out, note_ties
from epmq.merging.configs import check_configs, part_of
from epmq.merging.experts import TABLES, ExpertSet
from epmq.merging.readers import ExpertReader
from epmq.merging.vocabulary import agree_on_tokens
from epmq.models.adapter import Adapter
from epmq.models.adapter_head import task_of
from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import architecture_of
from epmq.models.meta import is_generator, vocabulary
from epmq.models.parts import is_numbered
from epmq.recipe import Expert

LOG = logging.getLogger("epmq")


def open_experts(
    base: str, experts: Sequence[Expert], tokenizer: str = "auto", changes: Mapping[str, Any] | None = None
) -> ExpertSet:
    """Open a base (a directory or Hub id) and its experts, and check that they fit.

    `tokenizer` and `changes` are the recipe's `tokenizer` and `config`.

    Raises:
        MissingError, InputError: a checkpoint is missing, or does not fit; the tensor and both shapes are named.
    """
    opened = ExpertSet(base, experts, changes)
    left = account_for_base(opened)
    _check_base(opened)
    agree_on_tokens(opened, tokenizer)
    for expert in opened.experts.values():
        if expert.adapter is not None:
            _check_adapter(opened, expert, expert.adapter)
            _note_adapter_head(opened, expert, expert.adapter)
        else:
            _check_checkpoint(opened, expert)
    note_left_out(opened, left)
    check_configs(opened)
    note_ties(opened)
    _warn_of_pickles(opened)
    return opened


def _check_base(experts: ExpertSet) -> None:
    base, state = experts.base, experts.model.state_dict()
    for name in experts.names:
        shape, expected = list(base.shape(name)), list(state[name].shape)
        if shape != expected:
            raise InputError(f"{base.path}: tensor {name!r} is {shape}, but {expected} by config.json")
        if torch.is_floating_point(state[name]) and base.dtype(name) is None:
            raise InputError(f"{base.path}: tensor {name!r} is {base.spec(name)[0]}, not float64, 32, 16 or bfloat16")
    inside = tuple(stack.name + "." for stack in find_stacks(experts.model))
    output = experts.output_layer()
    for name in [*experts.absent, *(name for name in base.stand_ins if name in experts.initial)]:
        if name in experts.computed:
            continue
        if name in output:
            raise InputError(f"{base.path}: no tensor for {name!r}, which its config.json does not tie to another")
        if name.startswith(inside) or name.endswith(TABLES):
            raise InputError(f"{base.path}: no tensor for {name!r} of {type(experts.model).__name__}")


def _check_checkpoint(experts: ExpertSet, expert: ExpertReader) -> None:
    checkpoint, task, path = expert.checkpoint, expert.task, expert.path
    ours, theirs = experts.config.get("model_type"), checkpoint.config.get("model_type")
    if ours != theirs and part_of(experts.model.config, checkpoint) is None:
        raise InputError(f"expert {task}: model type {theirs!r}, but the base is {ours!r} ({path})")
    if checkpoint.config.get("quantization_config"):
        raise InputError(f"expert {task}: quantized already; give the model it was quantized from ({path})")
    if not expert.stored:
        first = f"; its first is {checkpoint.names[0]!r}" if checkpoint.names else ""
        raise InputError(f"expert {task}: shares no tensor with the base{first} ({path})")
    account_for_expert(experts, expert)
    output = experts.output_layer() if is_generator(architecture_of(checkpoint.config) or "") else []
    beyond = _beyond(experts, expert)
    for name in experts.names:
        stored = expert.stored.get(name)
        if stored is None:
            if name in experts.computed or name in beyond:
                continue
            if name in output:
                raise InputError(f"expert {task}: no tensor for {name!r}, which its config does not tie ({path})")
            if is_numbered(name):
                raise InputError(f"expert {task}: tensor {name!r} is missing in {path}")
            experts.notes.depart(f"expert {task} has no tensor {name}: the base's takes its place")
            continue
        _check_shape(experts, expert, name, checkpoint.shape(stored))
        if experts.base.dtype(name) is not None and checkpoint.dtype(stored) is None:
            raise InputError(f"expert {task}: tensor {name!r} is {checkpoint.spec(stored)[0]}, not a float ({path})")


def _beyond(experts: ExpertSet, expert: ExpertReader) -> set[str]:
    """What of the model an expert's class does not have, where it lacks blocks: the expert is a part of the model."""
    lacking = [name for name in experts.names if name not in expert.stored and is_numbered(name)]
    beyond = experts.beyond(expert) if lacking else set[str]()
    if beyond.issuperset(lacking) and lacking:
        own = architecture_of(expert.checkpoint.config)
        experts.notes.depart(
            f"expert {expert.task} is a {own}, a part of the model; the base's: {listed(sorted(beyond))}"
        )
    return beyond


def _check_adapter(experts: ExpertSet, expert: ExpertReader, adapter: Adapter) -> None:
    task, stored = expert.task, expert.stored
    if not stored:
        raise InputError(f"expert {task}: the adapter changes no tensor of the base ({adapter.path})")
    for name in [*expert.extra, *(stored[name] for name in experts.absent if name in stored)]:
        if adapter.changes(name) and name not in experts.base.checkpoint:
            raise InputError(f"expert {task}: the adapter changes {name!r}, which the base lacks ({adapter.path})")
    for name in experts.names:
        if name in stored and adapter.replaces(stored[name]):
            _check_shape(experts, expert, name, adapter.shape(stored[name]))
        if name in stored and adapter.changes(stored[name]):
            shape = adapter.change_shape(stored[name])
            _check_shape(experts, expert, name, shape[::-1] if expert.is_transposed(name) else shape)


def _note_adapter_head(experts: ExpertSet, expert: ExpertReader, adapter: Adapter) -> None:
    """Note where an adapter names a task and brings no head for it, or changes a head that is left out."""
    task, head, own = task_of(adapter), expert.adapter_head, expert.own_head_names
    if own and head is None:
        experts.notes.depart(f"expert {expert.task}: {', '.join(own)} is in another head of the base: left out")
    if task is None or own or expert.head_file is not None:
        return
    place = "it has none" if head is None else f"the base's takes its place ({', '.join(head.from_base)})"
    experts.notes.depart(
        f"expert {expert.task}: the adapter names {task} but brings no head: {place}; name it in modules_to_save when "
        "training"
    )


def _check_shape(experts: ExpertSet, expert: ExpertReader, name: str, shape: tuple[int, ...]) -> None:
    expected = experts.base.shape(name)
    shape = experts.vocabulary.as_merged(expert.task, name, shape, expected)
    if shape != expected:
        tokens = shape[1:] == expected[1:] and expected[0] == vocabulary(experts.model)
        hint = "; a tokenizer beside it would say which tokens they are" if tokens else ""
        raise InputError(
            f"expert {expert.task}: tensor {name!r} is {list(shape)}, but {list(expected)} in the base "
            f"({expert.path}{hint})"
        )


def _warn_of_pickles(experts: ExpertSet) -> None:
    for checkpoint in (experts.base.checkpoint, *(expert.checkpoint for expert in experts.experts.values())):
        for name in checkpoint.pickles:
            note = f"{checkpoint.path / name} is a pickle: only tensors were read from it; safetensors are safer"
            experts.notes.append(note)
            LOG.warning(note)
