"""Bits layer by layer under a limit of size: what each layer costs at each width, and the best choice among them.

The cost of a layer is the share of the residual stream that its rounding moves: ‖Δz‖² / ‖z‖², where z is what its block
gives. Its loss, tr((Q − W*) H (Q − W*)ᵀ), is measured exactly at every width, and what a loss is worth in the stream by
running the block once with rounded weights: a layer's losses are in units of its own outputs, and cannot be added up.
The choice minimises Σ cost + λ Σ bytes for the λ at which the bytes fit (Lagrange; Shoham & Gersho 1988).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq.calibration.collect import LayerGroup
from epmq.calibration.engine import Block, CalibrationEngine
from epmq.calibration.outside import OutsideStep
from epmq.calibration.sequential import Batch, BlockStep
from epmq.calibration.tiles import TiledLayer
from epmq.errors import InputError
from epmq.merging.readers import TensorReader
from epmq.models.blocks import as_matrix
from epmq.models.hooks import first_tensor
from epmq.models.meta import set_tensor
from epmq.models.storage import Layout
from epmq.quantization.grid import Grid
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import rtn
from epmq.quantization.stacked import Solved, solve

# Halvings of the interval in which λ lies.
HALVINGS = 100
# The bits at which it is seen what a loss is worth: with fewer a layer may be beyond all proportion.
REFERENCE = 3
TINY = 1e-30

# Layer → what it costs on each of the grids that it may have.
Costs = dict[str, dict[Grid, float]]


class MeasuringEngine(CalibrationEngine):
    """Goes through the model with all targets unrounded, and measures what each layer would cost on each grid.

    Attributes:
        costs: complete at the end.
    """

    costs: Costs

    def __iter__(self) -> Iterator[Block]:
        self.costs = {}
        yield from super().__iter__()

    def _solve(self, step: BlockStep | OutsideStep, group: LayerGroup | TiledLayer, block: Block) -> None:
        free, search, alone = self.context.layout.free, self.context.layout.search, isinstance(group, TiledLayer)
        energies, losses = [0.0] * len(group.names), [dict[Grid, float]() for _ in group.names]
        references: list[Solved | None] = [None] * len(group.names)
        for tile in group.tiles():
            problem = tile.problem()
            target, hessian = problem.target, problem.hessian
            for local, module, weight in zip(tile.names, tile.modules, torch.split(target, tile.rows)):
                if not alone:
                    set_tensor(step.block, f"{local}.weight", as_matrix(module, weight))
            for number, energy in enumerate(torch.split(hessian_loss(target, hessian), tile.rows)):
                energies[number] += float(energy.sum())
            for grid in dict.fromkeys(grid for layer in group.layers for grid in free.get(layer, ())):
                parts = [replace(part, grid=grid) for part in tile.parts]
                for number, one in enumerate(solve(target, problem.factor, hessian, parts, search)):
                    losses[number][grid] = losses[number].get(grid, 0.0) + one.loss
                    grids = free.get(group.layers[number], ())
                    references[number] = one if grid in grids and grid.bits == REFERENCE else references[number]
        stream = _Stream(step) if isinstance(step, BlockStep) and step.lockstep and not alone else None
        for number, layer in enumerate(group.layers):
            reference = references[number]
            if reference is None:
                continue
            moved = stream.moved_by(group, number, reference.weight) if stream is not None and reference.loss else 0.0
            worth = moved / reference.loss if moved else 1 / max(energies[number], TINY)
            self.costs[layer] = {grid: losses[number][grid] * worth for grid in free[layer]}


class _Stream:
    """What a block gives on the first batch of each task, as it is, to see what a rounded layer changes of it."""

    def __init__(self, step: BlockStep) -> None:
        self._step = step
        self._before = {
            position: first_tensor(step.run(position)).float() for position, batch in step.members if not batch.index
        }

    def moved_by(self, group: LayerGroup | TiledLayer, number: int, weight: Tensor) -> float:
        """The share of the stream, ‖Δz‖² / ‖z‖², that moves with another weight [out, in] in one of the layers."""
        name, module, shares = f"{group.names[number]}.weight", group.modules[number], list[float]()
        plain = module.get_parameter("weight").detach()
        set_tensor(self._step.block, name, as_matrix(module, weight.float()))
        for position, before in self._before.items():
            delta = first_tensor(self._step.run(position)).float() - before
            shares.append(_share(delta, before, self._step.padding_mask(before)))
        set_tensor(self._step.block, name, plain)
        return sum(shares) / max(len(shares), 1)


def _share(delta: Tensor, whole: Tensor, mask: Tensor | None) -> float:
    """The mean over real tokens of ‖delta‖² / ‖whole‖²."""
    shares = delta.square().sum(-1) / whole.square().sum(-1).clamp(min=1e-12)
    return float((shares if mask is None or mask.shape != shares.shape else shares[mask]).mean())


def table_costs(layout: Layout, merged: TensorReader, batches: Sequence[Batch], aliases: Mapping[str, int]) -> Costs:
    """What tables cost on each grid: the share by which rounding moves the rows that calibration data looks up.

    `aliases` says for each table how many layers read it: as an output layer it costs as much again. Where the data
    looks up no rows, such as pictures alone, all rows count the same.
    """
    ids = [ids.flatten().cpu() for batch in batches for ids in _token_ids(batch)]
    costs: Costs = {}
    for name, times in aliases.items():
        rows = merged.tensor(f"{name}.weight")
        looked_up = torch.cat(ids) if ids else torch.arange(len(rows))
        tokens, counts = looked_up.unique(return_counts=True)
        used = tokens < len(rows)
        rows, weights = rows[tokens[used]].float(), counts[used].float()
        scale = layout.of[f"{name}.weight"].scale or torch.float32
        costs[name] = {}
        for grid in layout.free[name]:
            delta = rtn(rows, grid, search=layout.search, scale_dtype=scale).dequantize().float() - rows
            shares = delta.square().sum(-1) / rows.square().sum(-1).clamp(min=1e-12)
            costs[name][grid] = times * float((shares * weights).sum() / weights.sum())
    return costs


def _token_ids(batch: Batch) -> list[Tensor]:
    named = (value for name, value in batch.inputs.items() if name.endswith("input_ids"))
    return [value for value in named if isinstance(value, Tensor)]


@dataclass(frozen=True)
class _Option:
    grid: Grid
    cost: float
    bytes: int


def choose_grids(costs: Costs, sizes: Mapping[str, Mapping[Grid, int]], limit: int) -> dict[str, Grid]:
    """The grid of each layer with the least cost in all whose bytes fit.

    Args:
        costs: of each layer on each grid.
        sizes: bytes of each layer on each grid.
        limit: bytes of all layers together.

    Raises:
        InputError: even the smallest do not fit.
    """
    options = {
        layer: [_Option(grid, cost, sizes[layer][grid]) for grid, cost in by_grid.items()]
        for layer, by_grid in costs.items()
    }
    least = sum(min(option.bytes for option in own) for own in options.values())
    if least > limit:
        raise InputError(f"the smallest grids take {least} bytes, and there are {limit}")

    def at(price: float) -> dict[str, _Option]:
        return {
            layer: min(own, key=lambda one: (one.cost + price * one.bytes, one.bytes)) for layer, own in options.items()
        }

    low, high = 0.0, 1.0
    while _bytes(at(high)) > limit:
        high *= 4
    for _ in range(HALVINGS if _bytes(at(low)) > limit else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _bytes(at(middle)) > limit else (low, middle)
    chosen = at(high if _bytes(at(low)) > limit else low)
    _fill(chosen, options, limit)
    return {layer: option.grid for layer, option in chosen.items()}


def _bytes(chosen: Mapping[str, _Option]) -> int:
    return sum(option.bytes for option in chosen.values())


def _fill(chosen: dict[str, _Option], options: Mapping[str, Sequence[_Option]], limit: int) -> None:
    """Spend what is left where it saves the most a byte, until nothing more fits."""
    while True:
        left, best = limit - _bytes(chosen), None
        for layer, own in options.items():
            now = chosen[layer]
            for option in own:
                more, saved = option.bytes - now.bytes, now.cost - option.cost
                if 0 < more <= left and saved > 0 and (best is None or saved / more > best[0]):
                    best = saved / more, layer, option
        if best is None:
            return
        chosen[best[1]] = best[2]
