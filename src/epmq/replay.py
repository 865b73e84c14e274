"""Finished parts of a block run once more on a batch, and from then on give back what they gave.

A block whose layers are solved group by group runs once for each group. Its attention need not run again for the groups
after it: a module that holds finished layers only, whose inputs come from finished layers only, gives the same again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

from torch import Tensor, nn

from epmq.blocks import linears

# A module with fewer layers is hardly cheaper to keep than to run: one alone may give four times the stream.
FEWEST = 2
# Outputs of more than this many times the input are not kept: attention may give its weights for all pairs of tokens.
LARGEST = 2


class Replay:
    """The finished modules of one block, with what each call of theirs gave on each batch."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self._batch = 0
        self._kept: dict[nn.Module, dict[int, list[tuple[Any, list[int]]]]] = {}
        self._calls: dict[nn.Module, int] = defaultdict(int)

    def settle(self, layers: Set[str]) -> None:
        """Say which layers of the block are finished, by name: solved in the order in which they are called."""
        for module in _finished(self.block, layers):
            if module not in self._kept:
                self._kept[module] = defaultdict(list)
                module.forward = partial(self._give, module, module.forward)  # type: ignore[method-assign]

    def start(self, batch: int) -> None:
        """Say which batch the block runs on next."""
        self._batch = batch
        self._calls.clear()

    def close(self) -> None:
        """Give the modules their own forward back."""
        for module in self._kept:
            module.__dict__.pop("forward", None)
        self._kept = {}

    def _give(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kept, call = self._kept[module][self._batch], self._calls[module]
        self._calls[module] += 1
        if call < len(kept):
            output, versions = kept[call]
            if _versions(output) != versions:
                raise RuntimeError(
                    f"{type(self.block).__name__} changes what its {type(module).__name__} gives in place"
                )
            return output
        output = forward(*args, **kwargs)
        if call == len(kept) and _size(output) <= LARGEST * _size((*args, *kwargs.values())[:1]):
            kept.append((output, _versions(output)))
        for inner in module.modules():  # hardly anybody asks them again
            if inner is not module and inner in self._kept:
                self._kept[inner].pop(self._batch, None)
        return output


def _finished(module: nn.Module, layers: Set[str], prefix: str = "") -> Iterator[nn.Module]:
    """The largest modules that hold finished layers only; lists of modules are never called."""
    for name, child in module.named_children():
        inside = {f"{prefix}{name}.{layer}" for layer, _ in linears(child) if layer}
        if len(inside) < FEWEST:
            continue
        if inside <= layers and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _finished(child, layers, f"{prefix}{name}.")


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return [part for part in parts if isinstance(part, Tensor)]


def _size(output: Any) -> int:
    """How many numbers an output holds."""
    return sum(tensor.numel() for tensor in _tensors(output))


def _versions(output: Any) -> list[int]:
    """How often each tensor of an output has been changed in place."""
    return [tensor._version for tensor in _tensors(output)]
