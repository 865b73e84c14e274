"""A layer with so many rows that they are solved a tile at a time, such as an output layer of a large vocabulary."""

from collections.abc import Iterator

from torch import Tensor

from epmq.calibration.collect import LayerGroup
from epmq.calibration.context import CalibrationContext
from epmq.calibration.grouping import LayerTarget
from epmq.calibration.outside import OutsideStep
from epmq.calibration.sequential import BlockStep
from epmq.models.blocks import is_transposed
from epmq.quantization.hessian import Moments

# Entries of a tile: several copies of it are in memory while it is solved.
TILE = 1 << 26


class TiledLayer:
    """A layer whose moments are kept task by task, so that each tile of its rows can be solved by itself.

    It has the interface of `LayerGroup` for collecting. Rows know nothing of each other but the Hessian, which is
    factored once.
    """

    def __init__(self, context: CalibrationContext, step: BlockStep | OutsideStep, target: LayerTarget) -> None:
        self._context, self._step, self.target, self.names = context, step, target, target.names
        self._moments: list[tuple[str, Moments, float]] = []
        first = self._tile(0)
        self.layers, self.modules, self.features = first.layers, first.modules, first.features
        self.columns, self.device, self.dtype = first.columns, first.device, first.dtype
        self.tokens, self.largest, self.pooled = 0, 0.0, 0

    def _tile(self, start: int) -> LayerGroup:
        height = tile_height(self._step.block.get_submodule(self.names[0]).get_parameter("weight"))
        return LayerGroup(self._context, self._step, self.target, slice(start, start + height))

    def add_task(self, task: str, moments: Moments, aims: bool, share: float = 1.0) -> None:
        """Keep one task's moments; arguments as in `LayerGroup.add_task`."""
        self.tokens += moments.count
        self._moments.append((task, moments, share))

    def tiles(self) -> Iterator[LayerGroup]:
        """The tiles, from the first rows to the last, each with all that was collected."""
        weight, before = self.modules[0].get_parameter("weight"), None
        for start in range(0, len(weight), tile_height(weight)):
            tile = self._tile(start)
            for task, moments, share in self._moments:
                tile.add_task(task, moments, aims=False, share=share)
            if before is not None:
                tile.objective.take_factor(before.objective)
            yield tile
            before = tile


def tile_height(weight: Tensor) -> int:
    """Rows of a tile of a weight [out, in]."""
    return max(1, TILE // max(1, weight.shape[1]))


def layer_group(
    context: CalibrationContext, step: BlockStep | OutsideStep, target: LayerTarget
) -> LayerGroup | TiledLayer:
    """What is collected for layers that share an input: a large one that stands alone is solved in tiles."""
    module = step.block.get_submodule(target.names[0])
    weight = module.get_parameter("weight")
    large = len(target.names) == 1 and target.add is None and not is_transposed(module) and weight.numel() > TILE
    return (TiledLayer if large else LayerGroup)(context, step, target)
