"""A model in codes of which everything but the codes can be trained.

What is trained: a factor on each scale of the linear layers, all one-dimensional tensors beside them (norms, biases,
layer scales), and the last linear map of each task's head. Codes and zero points stay, and so do tables.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from epmq import matmul
from epmq.models.heads import Head
from epmq.models.multitask import MultiTaskModel, NativeHead
from epmq.models.packed import InCodes, PackedConv1D, PackedLinear, PackedWeight

# Layers whose product is known; a subclass with a forward of its own keeps its scales.
MULTIPLY = (PackedLinear.forward, PackedConv1D.forward)
# The tensors of a head's last linear map.
LEAVES = ("weight", "bias")


# Threads of products while all else is left to one; see `in_order`.
_threads: list[int] = []


@contextmanager
def in_order() -> Iterator[None]:
    """Leave sums of gradients to one thread in a `with` block: their last digits depend on the number of threads.

    Products of `ScaledProduct`, which take most of the time, and do not depend on it, have all of them.
    """
    _threads.append(torch.get_num_threads())
    try:
        with matmul.one_thread():
            yield
    finally:
        _threads.pop()


@contextmanager
def _all_threads() -> Iterator[None]:
    """As many threads in a `with` block as there were outside of `in_order`."""
    before = torch.get_num_threads()
    torch.set_num_threads(_threads[-1] if _threads else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ScaledProduct(torch.autograd.Function):
    """inputs · (weight in codes, each scale times its factor)ᵀ; the weight is made for the call, and again backwards.

    `apply(inputs [..., in], factor [out, groups], packed)` gives [..., out]; inputs and factor are of the dtype that
    the packed weight is computed in.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: Tensor, packed: PackedWeight) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        ctx.packed, ctx.shape = packed, inputs.shape
        with _all_threads():
            if factor.shape[1] == 1:  # the factor's gradient follows from the product, without a further one
                saved = matmul.linear(rows, packed.dequantize())
                scaled = saved * factor.T
            else:
                saved, scaled = rows, matmul.linear(rows, _times(packed.dequantize(), factor))
        ctx.save_for_backward(saved, factor)
        return scaled.reshape(*inputs.shape[:-1], len(factor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved, factor = ctx.saved_tensors
        gradient, of_factor, of_rows = gradient.reshape(-1, len(factor)), None, None
        for_rows, for_factor, _ = ctx.needs_input_grad
        with _all_threads():
            weight = ctx.packed.dequantize()
            if for_factor and factor.shape[1] > 1:
                width = weight.shape[1] // factor.shape[1]
                parts = zip(saved.split(width, 1), weight.split(width, 1))
                of_factor = torch.stack([(matmul.matmul(gradient.T, own) * part).sum(1) for own, part in parts], 1)
            if for_rows:
                of_rows = matmul.linear(gradient, _times(weight, factor).T)
        if for_factor and factor.shape[1] == 1:
            of_factor = (gradient * saved).sum(0)[:, None]
        return None if of_rows is None else of_rows.reshape(ctx.shape), of_factor, None


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """A weight [out, in] with each group of columns times its factor [out, groups], in its place."""
    weight.unflatten(1, (factor.shape[1], -1)).mul_(factor.unsqueeze(-1))
    return weight


class Student:
    """A model in codes with what of it is trained, and how that will be stored.

    Args:
        model: as `epmq.load` gives it with `weights="packed-exact"`, in float32.
        blocks: names of the backbone's blocks; of each, nothing but its inputs is kept for the gradients.
        dtypes: in which dtype every tensor is stored, by its name in the backbone, or HEAD.format(task, leaf) of a
            head's last linear map; of what is not in it nothing is trained.

    Attributes:
        backbone: the model.
        heads: task → its head.
        parameters: what is trained, in float32. Factors go by the names of the layers.
        start: the same as they were stored at first, with scales in the place of factors.
    """

    HEAD = "heads/{}.{}"

    def __init__(self, model: MultiTaskModel, blocks: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dtypes
        self.backbone = model.backbone
        self.heads = {task: model.head(task) for task in model.tasks}
        model.requires_grad_(False)
        self.parameters: dict[str, nn.Parameter] = {}
        self._scaled: dict[str, PackedWeight] = {}
        for name, layers, is_table in _products(model.backbone):
            packed = layers[0].packed
            factor = nn.Parameter(torch.ones_like(packed.scale, dtype=packed.dtype), requires_grad=False)
            if not is_table:
                self._scaled[name], self.parameters[name] = packed, factor
            for layer in layers:
                layer.forward = partial(_multiply, layer, type(layer).forward, factor)
        for name, parameter in model.backbone.named_parameters():
            if name in dtypes and parameter.ndim == 1 and parameter.is_floating_point():
                self.parameters[name] = parameter
        for task in model.tasks:
            self._take_head(task, model.head(task))
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        for name in blocks:
            block = model.backbone.get_submodule(name)
            block.forward = partial(_checkpointed, block.forward)
        self.start = self.stored()

    def _take_head(self, task: str, head: Head | NativeHead) -> None:
        """Let the last linear map of a task's head be trained."""
        if isinstance(head, Head):
            own: list[Any] = [nn.Parameter(plain.to(self.device, copy=True)) for plain in (head.weight, head.bias)]
            self.heads[task] = replace(head, weight=own[0], bias=own[1])
        else:
            own = [getattr(head.scoring, leaf, None) for leaf in LEAVES]
        named = {self.HEAD.format(task, leaf): parameter for leaf, parameter in zip(LEAVES, own)}
        self.parameters |= {name: one for name, one in named.items() if one is not None and name in self._dtypes}

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.backbone.parameters()).device)

    def stored(self) -> dict[str, Tensor]:
        """Everything that is trained as it will be stored, in its dtype; scales in the place of factors."""
        found = {}
        for name, parameter in self.parameters.items():
            value = parameter.detach()
            if name in self._scaled:
                start = self._scaled[name].scale
                scale = (start.float() * value.float()).to(start.dtype)
                found[name] = torch.where(scale == 0, start, scale)  # what is too small for its dtype
            else:
                found[name] = value.to(self._dtypes[name], copy=True)
        return found

    def begin_at(self, start: Mapping[str, Tensor]) -> None:
        """Go back to tensors as `stored` gives them, wherever the model has been since."""
        self.start = {name: tensor.to(self.device) for name, tensor in start.items()}
        self._set(self.start)
        for name in self._scaled:
            self.parameters[name].data.fill_(1.0)

    @contextmanager
    def as_stored(self, stored: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """In a `with` block, compute with what will be stored, or with other tensors of this kind; no gradients."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self.stored() if stored is None else stored)
        try:
            with torch.no_grad():
                yield
        finally:
            self._set({name: self.start[name] if name in self._scaled else one for name, one in values.items()})

    def _set(self, stored: Mapping[str, Tensor]) -> None:
        for name, tensor in stored.items():
            if name in self._scaled:
                self._scaled[name].scale = tensor
            else:
                self.parameters[name].data.copy_(tensor)


def _products(backbone: nn.Module) -> Iterator[tuple[str, list[Any], bool]]:
    """Linear layers by their weight in codes: the first one's name, all of them, whether it is a table as well."""
    holders: dict[PackedWeight, list[tuple[str, Any]]] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, InCodes):
            holders.setdefault(module.packed, []).append((name, module))
    for held in holders.values():
        layers = [(name, module) for name, module in held if type(module).forward in MULTIPLY]
        if layers:
            yield layers[0][0], [module for _, module in layers], len(layers) < len(held)


def _multiply(layer: Any, plain: Callable[..., Tensor], factor: Tensor, inputs: Tensor) -> Tensor:
    """What a layer gives while factors are trained; without gradients, what it gives by its scales."""
    if not torch.is_grad_enabled():
        return plain(layer, inputs)
    product: Tensor = ScaledProduct.apply(inputs, factor, layer.packed)  # type: ignore[no-untyped-call]
    return product if layer.bias is None else product + layer.bias


def _checkpointed(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a block gives; for gradients it is run once more, so that no more than its inputs is kept."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, *args, **kwargs), use_reentrant=False, preserve_rng_state=False)
