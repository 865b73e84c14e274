"""Whole models from disk whose weights stay in codes, a layer at a time: the plain model is never in memory."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from epmq.errors import InputError, error_context
from epmq.models.blocks import LINEAR
from epmq.models.checkpoint import architecture_of
from epmq.models.codes import CodedCheckpoint
from epmq.models.initial import fill_absent, initial_values
from epmq.models.loading import plain_config, take_generation_settings
from epmq.models.meta import (
    backbone_class,
    empty_model,
    move_rest,
    named_class,
    no_larger,
    rename,
    set_tensor,
    tie,
    tied_names,
)
from epmq.models.packed import PackedWeight, can_be_packed, pack
from epmq.quantization.grid import QuantizedTensor
from epmq.runtime import return_freed_memory


def load_packed(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto", kernels: bool = True
) -> Any:
    """A packed checkpoint as the model that its config names, in eval mode, whose weights stay in codes.

    Linear layers and tables become `PackedLinear`, `PackedConv1D` and `PackedEmbedding`, those of subclasses too. Codes
    of anything else, and of a table with a `max_norm`, are made plain here. What is tied shares its codes. What no file
    holds is as the class initialises it, and zero where that is random.

    Args:
        path: directory or Hub id.
        device: where the model is to be.
        dtype: in which it computes; "auto" is what the config says, or else the scales' own.
        kernels: let kernels for codes multiply few rows, in bfloat16; without, its outputs are the plain model's.

    Raises:
        FileNotFoundError: no such directory, or it holds no model.
        ValueError: its weights are not packed, transformers has no such model, or a tensor does not fit it.
    """
    source, device = CodedCheckpoint(path), torch.device(device)
    model = _outline(source, dtype)
    names, _ = rename(model, source.weights())
    tied, dtypes = tied_names(model), _dtypes(model)
    holders = _holders(names, tied)
    covered = {name for held in holders.values() for name in held}
    absent = [name for name in model.state_dict() if name not in covered]
    fill_absent(model, absent, initial_values(model, absent), device)
    _check_shapes(model, source, names)
    for name, held in holders.items():
        layer = names[name].removesuffix(".weight")
        if layer in source.grids:
            _take_codes(model, held, source.codes(layer).to(device), dtypes[name], kernels)
        else:
            tensor = source.tensor(names[name]).clone().to(device)
            set_tensor(model, name, tensor.to(dtypes[name]) if tensor.is_floating_point() else tensor)
    move_rest(model, device)
    plain = {name for name, parameter in model.named_parameters(remove_duplicate=False)}
    tie(model, {name: held[0] for held in holders.values() for name in held[1:] if name in plain})
    take_generation_settings(model, source.checkpoint.path)
    return_freed_memory()  # what was unpacked and packed has left holes
    return model


def _outline(source: CodedCheckpoint, dtype: torch.dtype | str) -> Any:
    """The model with parameters on the meta device and real buffers, in the dtype that it computes in."""

    file = source.checkpoint.path / source.checkpoint.CONFIG
    if dtype == "auto":
        scales = (source.checkpoint.tensor(f"{layer}.weight_scale").dtype for layer in source.grids)
        dtype = source.dtype or next(scales, torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    with error_context(file, "transformers cannot load this model"):
        config = plain_config(source.checkpoint.path)
        model_class = named_class(architecture_of(source.config)) or backbone_class(config)
        if model_class is None:
            raise InputError(f"there is no plain model of {type(config).__name__}")
        bounds = no_larger(file, len(source.checkpoint.names), source.checkpoint.bits)
        return empty_model(model_class, config, bounds, dtype=dtype)


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """In which dtype each tensor is computed with: that of the model, or float32 where its class asks for that."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    patterns = [(re.compile(glob.replace("*", ".*")), kept) for glob, kept in plan.items()]
    return {
        name: next((kept for pattern, kept in patterns if pattern.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _holders(names: Iterable[str], tied: dict[str, str]) -> dict[str, list[str]]:
    """Tensors on disk, by their names in the model → all names in the model that have the tensor, that one first.

    A tied copy that is on disk as well is its own; where only the copy is, the other follows it.
    """
    holders = {name: [name] for name in names}
    groups: dict[str, list[str]] = {}
    for follower, leader in tied.items():
        groups.setdefault(leader, [leader]).append(follower)
    for group in groups.values():
        first = next((name for name in group if name in holders), None)
        if first is not None:
            holders[first] += [name for name in group if name not in holders]
    return holders


def _check_shapes(model: Any, source: CodedCheckpoint, names: dict[str, str]) -> None:
    """Refuse tensors on disk that have another shape than in the model; the InputError names the first."""
    state = model.state_dict()
    for name, stored in names.items():
        layer = stored.removesuffix(".weight")
        shape = source.shape(layer) if layer in source.grids else source.checkpoint.shape(stored)
        if layer in source.grids and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
            shape = shape[::-1]  # codes are [out, in] of any layer
        if tuple(state[name].shape) != tuple(shape):
            raise InputError(
                f"{source.checkpoint.path}: tensor {stored!r} is {list(shape)}, and by config.json it must be "
                f"{list(state[name].shape)}"
            )


def _take_codes(model: Any, held: list[str], weight: QuantizedTensor, dtype: torch.dtype, kernels: bool) -> None:
    """Give codes to the layers and tables that the tensors named `held` are the weights of, as one and the same."""
    modules = dict.fromkeys(model.get_submodule(name.rpartition(".")[0]) for name in held)
    packable = [module for module in modules if can_be_packed(module) and "weight" in module._parameters]
    if packable:
        table = any(isinstance(module, nn.Embedding) for module in packable)
        multiplied = any(isinstance(module, LINEAR) for module in packable)
        packed = PackedWeight(weight, dtype, kernels and multiplied, table)
    for module in packable:
        pack(module, packed)
    if len(packable) < len(modules):
        plain = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)
        for name in held:
            if model.get_submodule(name.rpartition(".")[0]) not in packable:
                set_tensor(model, name, plain)
