"""One forward of a shared backbone for the heads of all tasks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of a call, and what it gave.
Call = tuple[tuple[Any, ...], dict[str, Any], Any]


class Replay:
    """What the parts of a backbone gave the first head, for the heads after it.

    A part is replayed where it is called for the same time with the same arguments, and neither it nor anything that
    ran before it has a tensor of the head's own in it, such as a pooler.
    """

    def __init__(self) -> None:
        self._calls: dict[nn.Module, list[Call]] = {}
        self._made: dict[nn.Module, int] = {}
        self._own: set[nn.Module] = set()
        self._left = False

    @contextmanager
    def head(self, own: set[nn.Module]) -> Iterator[None]:
        """In a `with` block a head runs; `own` are the modules of the backbone in which it has other tensors."""
        self._own, self._left, self._made = own, False, {}
        yield

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        """A forward of a module that is replayed where it can be."""
        forward = module.forward

        def replayed(*args: Any, **kwargs: Any) -> Any:
            calls, number = self._calls.setdefault(module, []), self._made.get(module, 0)
            self._made[module] = number + 1
            if number < len(calls) and not self._left and module not in self._own:
                earlier = calls[number]
                if _alike(earlier[0], args) and _alike(earlier[1], kwargs):
                    return earlier[2]
            output = forward(*args, **kwargs)
            self._left |= module in self._own
            if number == len(calls):
                calls.append((args, kwargs, output))
            return output

        return replayed


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same. While a graph is made of a model, numbers are not known: shapes stand in."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one is other:
            return True
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and (torch.compiler.is_compiling() or torch.equal(one, other))
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and type(one) is type(other):
        return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())
    return one is other or bool(type(one) is type(other) and isinstance(one, int | float | str) and one == other)


@contextmanager
def replaying(backbone: Any) -> Iterator[Replay]:
    """In a `with` block the backbone and its larger parts go through a `Replay`."""
    replay = Replay()
    inner = getattr(backbone, getattr(backbone, "base_model_prefix", ""), None)
    whole = [backbone, inner] if isinstance(inner, nn.Module) and inner is not backbone else [backbone]
    wrapped = dict.fromkeys([*whole, *(part for one in whole for part in _parts(one))])
    before = {module: module.__dict__.get("forward") for module in wrapped}
    try:
        for module in wrapped:
            module.forward = replay.wrap(module)
        yield replay
    finally:
        for module, forward in before.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.forward = forward


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that a module's own code calls: its children, and those of its lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child
