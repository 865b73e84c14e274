"""Find the layers that write to a block's residual stream, and where the stream can be read after each of them.

Nothing here knows an architecture. A layer's output is disturbed; the first tensor in the block that moves by exactly
that disturbance, up to one factor a channel, and that is more than the output itself, is the sum it was added into.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epmq.models.hooks import HookPoint, watch

# Share of a movement that may be left unexplained; rounding leaves about 1e-5.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class ResidualAdd:
    """Where the output y of a layer ends up: in z = h + s ∘ y."""

    point: HookPoint  # the module of the block that receives z; None if z is the block's output
    scale: Tensor  # s, [out] float32, such as a layer scale; ones for a plain sum
    skip_input: str  # the module of the block that receives h


def find_residual_adds(block: nn.Module, layers: Sequence[str], run: Callable[[], Any]) -> dict[str, ResidualAdd]:
    """The sums that the named layers write to.

    Left out are layers that write to none or are called more than once, and sums whose h is the input of no module that
    is called before the layer.

    Args:
        block: with the layers, which are linear.
        layers: their names in it.
        run: calls the block on real data; it must do the same each time.
    """
    before = _record(block, run)
    adds = {}
    for name in layers:
        with _disturbed(block.get_submodule(name)) as calls:
            after = _record(block, run)
        if len(calls) != 1:
            continue
        output, noise = calls[0]
        for point, tensors in before.items():
            if len(tensors) != 1 or len(after[point]) != 1:
                continue
            scale = _scale(tensors[0], after[point][0], output, noise)
            if scale is None:
                continue
            skip_input = _skip_input(before, name, tensors[0], scale * output.float())
            if skip_input is not None:
                adds[name] = ResidualAdd(point, scale, skip_input)
            break
    return adds


def _skip_input(before: dict[HookPoint, list[Tensor]], layer: str, total: Tensor, share: Tensor) -> str | None:
    """The first module called before the layer whose input is what the layer's share is added to."""
    skipped = total.float() - share
    for point, tensors in before.items():
        if point is None or point == layer:
            return None
        if len(tensors) != 1 or tensors[0].shape != skipped.shape:
            continue
        if (tensors[0].float() - skipped).norm() <= TOLERANCE * share.norm():
            return point
    return None


@contextmanager
def _disturbed(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Add noise as large as the layer's output to it; yields (output, noise), one pair a call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(len(calls))).to(output)
        noise *= output.std()
        calls.append((output, noise))
        return output + noise

    with layer.register_forward_hook(disturb):
        yield calls


def _scale(old: Tensor, new: Tensor, output: Tensor, noise: Tensor) -> Tensor | None:
    """s, if new − old = s ∘ noise and `old` is more than s ∘ output."""
    if not old.shape == new.shape == noise.shape:
        return None
    old, new, output, noise = (tensor.flatten(0, -2).float() for tensor in (old, new, output, noise))
    scale = (noise * (new - old)).sum(0) / noise.square().sum(0)
    if not (scale.isfinite() & (scale != 0)).all():
        return None
    explained = scale * noise
    if (new - old - explained).norm() > TOLERANCE * explained.norm():
        return None
    return scale if (old - scale * output).norm() > TOLERANCE * old.norm() else None


def _record(block: nn.Module, run: Callable[[], Any]) -> dict[HookPoint, list[Tensor]]:
    """What every module of the block receives, in order of its first call, and last what the block gives."""
    tensors: dict[HookPoint, list[Tensor]] = {}

    def record(point: HookPoint, tensor: Tensor) -> None:
        tensors.setdefault(point, []).append(tensor)

    with ExitStack() as stack:
        for point in [*(name for name, _ in block.named_modules() if name), None]:
            stack.enter_context(watch(block, point, partial(record, point)))
        run()
    return tensors
