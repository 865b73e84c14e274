"""Hooks on a model's modules, and settings of its configs, for the length of a `with` block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Where a hook reads a tensor: a module of a block, by its name, or None, the block's own output.
HookPoint = str | None


def watch(block: nn.Module, point: HookPoint, note: Callable[[Tensor], object]) -> RemovableHandle:
    """Hand over the tensor at a point of a block each time that it is computed.

    At a module it is the first tensor among the arguments; at None, the first that the block returns. The handle is a
    context manager that removes the hook.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None:
            note(tensor)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(first_tensor(output))

    if point is None:
        return block.register_forward_hook(after, prepend=True)
    return block.get_submodule(point).register_forward_pre_hook(before, with_kwargs=True)


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block gives: the output itself, or its first part."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Ask for no key–value cache: one would grow each time that a block runs on the same batch."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


class _Stop(Exception):
    """Ends a forward."""


def stops_before(model: nn.Module, layer: nn.Module | None, inputs: dict[str, Any]) -> None:
    """Run a model up to a layer, or to its end where that is None or not called; what it gives is not asked for."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Stop

    hook = layer.register_forward_pre_hook(stop) if layer is not None else None
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        if hook is not None:
            hook.remove()
