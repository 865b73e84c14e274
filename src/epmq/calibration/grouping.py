"""How the layers of a block are called: which share an input, on which tokens, and what they aim at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.calls import on_meta
from epmq.calibration.outside import OutsideStep
from epmq.calibration.residual import ResidualAdd, find_residual_adds
from epmq.calibration.sequential import BlockStep
from epmq.models.blocks import InputGroup, input_groups, linears
from epmq.models.hooks import HookPoint
from epmq.models.mixtures import mixtures
from epmq.models.storage import join


@dataclass(frozen=True)
class LayerTarget:
    """Layers of a block that share an input.

    Attributes:
        names: within the block, in order of call.
        waits: whether every batch can wait before them: each is called once, on all tokens.
        routed: whether values decide which tokens they see, as in a mixture: an expert's own are others.
        add: the sum in the residual stream that the layer writes to and whose value in the expert it aims at, if any.
        mixture: the mixture within the block whose experts' layers these are: what they share is its input, and each
            expert sees a part of that.
    """

    names: list[str]
    waits: bool = True
    routed: bool = False
    add: ResidualAdd | None = None
    mixture: str | None = None

    @property
    def place(self) -> str:
        """Where batches wait, if they do."""
        return self.mixture or self.names[0]

    def points(self, features: bool) -> list[HookPoint]:
        """Where the expert's own values are asked for, if anywhere: in the stream, or at the layers' inputs."""
        if self.mixture is not None:
            return [self.mixture] if features else []
        if self.add is not None:
            return [self.add.point]
        return [self.names[0]] if features and not self.routed else []


def find_targets(
    step: BlockStep | OutsideStep, stream: bool, solves: Callable[[str], bool] = lambda layer: True
) -> tuple[list[LayerTarget], list[str]]:
    """The layers of a step by their inputs, in the order of the forward, and those that no batch comes by.

    Args:
        stream: layers that write to the residual stream aim at the experts' own.
        solves: whether the layer of that name in the model is one to be solved; others are left out.
    """
    found, idle = _outside_targets(step) if isinstance(step, OutsideStep) else _block_targets(step, stream)
    targets = []
    for target in found:
        names = [name for name in target.names if solves(join(step.name, name))]
        targets += [replace(target, names=names)] if names or target.mixture is not None else []
    return targets, [name for name in idle if solves(join(step.name, name))]


def _outside_targets(step: OutsideStep) -> tuple[list[LayerTarget], list[str]]:
    """As `find_targets`, of layers after the last block."""
    runs = [partial(step.run, position) for position, _ in step.members]
    groups = input_groups(step.block, *runs[:1])
    if set(step.layers).difference(*(group.names for group in groups)):  # other batches may come by
        groups = input_groups(step.block, *runs)
    named = [[name for name in group.names if name in step.layers] for group in groups]
    return [LayerTarget(names, waits=False) for names in named if names], [
        name for name in step.layers if not any(name in names for names in named)
    ]


def _block_targets(step: BlockStep, stream: bool) -> tuple[list[LayerTarget], list[str]]:
    """As `find_targets`, of a block."""
    runs = [_Run(step, position) for position, _ in step.members[:1]]
    units = mixtures(step.block) if step.lockstep else {}
    groups = input_groups(step.block, *runs, units=units)
    within = {name: [f"{name}.{local}" for local, _ in linears(unit)] for name, unit in units.items()}
    called = {name for group in groups for name in (*group.names, *within.get(group.names[0], ()))}
    idle = {name for name, _ in linears(step.block)} - called
    routed = not all(_on_all_tokens(group, runs) for group in groups) and _depends_on_values(step.block, runs)
    if idle or routed:  # other batches may come by, and on other tokens
        runs = [_Run(step, position) for position, _ in step.members]
        groups = input_groups(step.block, *runs, units=units)
        routed = routed or _depends_on_values(step.block, runs)
        idle.difference_update(*((*group.names, *within.get(group.names[0], ())) for group in groups))
    targets = []
    for group in groups:
        name = group.names[0]
        if name in units:
            targets.append(LayerTarget(within[name], routed=True, mixture=name))
            continue
        chosen = routed and not _on_all_tokens(group, runs)
        targets.append(LayerTarget(group.names, step.lockstep and group.calls == 1 and not chosen, chosen))
    single = [target for target in targets if len(target.names) == 1 and target.mixture is None]
    alone = [target.names[0] for target in single if stream and target.waits]
    adds = find_residual_adds(step.block, alone, runs[0]) if alone else {}
    targets = [replace(target, add=adds.get(target.place)) for target in targets]
    return targets, [name for name, _ in linears(step.block) if name in idle]


class _Run:
    """Runs a block on one batch. After that it knows what the block was first called with."""

    def __init__(self, step: BlockStep, position: int) -> None:
        self._step, self._position = step, position
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __call__(self) -> Any:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        with self._step.block.register_forward_pre_hook(note, with_kwargs=True):
            output = self._step.run(self._position)
        self.arguments = calls[0] if calls else self.arguments
        return output

    @property
    def tokens(self) -> set[int]:
        """How many tokens there are in each tensor that the block was called with."""
        args, kwargs = self.arguments
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        return {tensor.shape[:-1].numel() for tensor in tensors}


def _on_all_tokens(group: InputGroup, runs: Sequence[_Run]) -> bool:
    """Whether each call of the layers had all tokens of something that the block was called with."""
    return all(set(rows) <= run.tokens for rows, run in zip(group.rows, runs))


def _depends_on_values(block: nn.Module, runs: Sequence[_Run]) -> bool:
    """Whether shapes alone do not tell what the block does with its arguments, in the first run that calls it."""
    run = next((run for run in runs if run.arguments != ((), {})), runs[0])
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    args, kwargs = on_meta(run.arguments)
    try:
        torch.func.functional_call(block, on_meta(state), args, kwargs)
    except Exception:
        return True
    return False
