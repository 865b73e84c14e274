"""Mixtures of experts: fused tensors of all experts, as linear layers of each.

transformers keeps the matrices of all experts in three-dimensional parameters. Here every expert has linear layers of
its own, so that each is merged as a matrix, calibrated on the tokens that reach it, and packed by its name. Which
modules these are, and how they compute, is asked of transformers' own interface for experts.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# What transformers calls the fused parameters, and what the layers that they hold are called here.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
BIAS = "_bias"
# How the names of an expert's own tensors end, where they are called so on disk.
OWN = re.compile(r"\.\d+\.(gate|up|down)_proj\.(weight|bias)")
# What its decorator of experts leaves in a module.
_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_apply_gate")


class ExpertLayers(nn.Module):
    """The linear layers of one expert: `gate_proj`, where it has one, `up_proj` and `down_proj`."""

    def __init__(self, sizes: dict[str, tuple[int, int]], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        for name, (rows, columns) in sizes.items():
            self.add_module(name, nn.Linear(columns, rows, bias, device="meta", dtype=dtype))


class Mixture(nn.Module):
    """All experts of a mixture, in the place of a module of transformers; `experts.3.up_proj` is a linear layer.

    Args:
        fused: a module that transformers' `use_experts_implementation` has decorated, on the meta device.

    Attributes:
        count: of experts.
        fused_names: parameter of the module → names of the layers whose weights lie in it.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        marks: Any = fused
        self.has_gate, self.has_bias = bool(marks.has_gate), bool(marks.has_bias)
        self.is_transposed, self.interleaves = bool(marks.is_transposed), not marks.is_concatenated
        own = dict(fused._parameters)
        self.fused_names = {name: layers for name, layers in FUSED.items() if name in own}
        sizes = dict[str, tuple[int, int]]()
        for name, layers in self.fused_names.items():
            shape = own[name].shape  # type: ignore[union-attr]
            rows, columns = (shape[2], shape[1]) if self.is_transposed else (shape[1], shape[2])
            sizes |= {layer: (rows // len(layers), columns) for layer in layers}
        weight = fused.get_parameter("down_proj")
        self.count = weight.shape[0]
        for name in own:
            del fused._parameters[name]
        for index in range(self.count):
            self.add_module(str(index), ExpertLayers(sizes, self.has_bias, weight.dtype))
        for name, module in fused.named_children():
            self.add_module(name, module)
        object.__setattr__(self, "_fused", fused)  # for what it computes between its layers, and no module of this one
        self.train(fused.training)

    def fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that transformers has in the place of the layers."""
        shapes, first = dict[str, tuple[int, ...]](), self.experts[0]
        for name, layers in self.fused_names.items():
            weights = [first.get_submodule(layer).weight.shape for layer in layers]
            rows, columns = sum(weight[0] for weight in weights), weights[0][1]
            shapes[name] = (self.count, columns, rows) if self.is_transposed else (self.count, rows, columns)
            if self.has_bias:
                shapes[name + BIAS] = (self.count, rows)
        return shapes

    @property
    def experts(self) -> list[Any]:
        """The layers of each expert."""
        return [self._modules[str(index)] for index in range(self.count)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what the experts give that the router has chosen.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: experts that each token goes to, [tokens, k].
            top_k_weights: of each of them, [tokens, k].

        Returns:
            [tokens, hidden]. On the meta device all experts see all tokens: there are no values to go by.
        """
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            if hidden_states.is_meta:
                self.finish(expert.down_proj(self.inner(expert, hidden_states)))
                continue
            tokens, places = (top_k_index == index).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            given = self.finish(expert.down_proj(self.inner(expert, hidden_states[tokens])))
            given = given * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, given.to(total.dtype))
        return total

    def inner(self, expert: Any, inputs: Tensor) -> Tensor:
        """What an expert's last layer receives on inputs [tokens, hidden]: [tokens, inner]."""
        fused: Any = self._fused
        up = expert.up_proj(inputs)
        if not self.has_gate:
            activated: Tensor = fused.act_fn(up)
            return activated
        gate = expert.gate_proj(inputs)
        pair = torch.stack([gate, up], -1).flatten(-2) if self.interleaves else torch.cat([gate, up], -1)
        gated: Tensor = fused._apply_gate(pair)
        return gated

    def finish(self, given: Tensor) -> Tensor:
        """What is done to the outputs of an expert's last layer before they are weighed."""
        norm = self._modules.get("post_expert_norm")
        finished: Tensor = given if norm is None else norm(given)
        return finished


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts as transformers' decorator knows them, and nothing else of its own."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    marks: Any = module
    first = "gate_up_proj" if marks.has_gate else "up_proj"
    names = {first, "down_proj"} | ({first + BIAS, "down_proj" + BIAS} if marks.has_bias else set())
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    shaped = all(len(own[name].shape) == (2 if name.endswith(BIAS) else 3) for name in own)
    return own.keys() == names and shaped and not any(True for _ in module.buffers(recurse=False))


def unfuse(model: Any) -> Any:
    """Put a `Mixture` in the place of every module of fused experts of a model on the meta device; returns it."""
    for path, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Mixture(module))
    return model


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model or a block, by their names in it."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Mixture)}


def routers(model: nn.Module) -> Iterator[str]:
    """Names of the modules that choose experts or weigh them: what lies beside a mixture and gives a number for each.

    A shared expert's gate, which gives one number, is among them.
    """
    for path, mixture in mixtures(model).items():
        parent = path.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_children():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 2 and weight.shape[0] in (1, mixture.count):
                yield f"{parent}.{name}" if parent else name
