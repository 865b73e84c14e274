"""From settings to storage: which tensors lie on which grid, and in which dtype all others are written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import nn

from epmq.errors import InputError, error_context
from epmq.merging.experts import ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.models.blocks import LINEAR, block_linears, find_stacks, is_transposed
from epmq.models.meta import token_tables, vocabulary
from epmq.models.mixtures import routers
from epmq.models.storage import Layout, Storage
from epmq.models.towers import beside_language
from epmq.quantization.grid import BITS, Grid
from epmq.quantize_settings import QuantizeSettings
from epmq.storage_settings import PLAIN, PartGrid, describe

# What a plan tells the storage of.
PARTS = BLOCKS, TABLES, OUTSIDE, OUTPUT, REST = "blocks", "tables", "outside the blocks", "output layer", "rest"
# Names of layers that an error about a pattern lists.
LISTED = 3
# Groups in which a layer may have the fewest bits under a limit of size, where it has smaller ones.
COARSE = 128


@dataclass(frozen=True)
class _Part:
    """What a weight is to a quantizer: the settings that it would have without overrides, and their field."""

    grid: Grid | None
    field: str
    in_block: bool = False
    beside: bool = False  # in a tower or a projector beside a language model


class LayoutPlanner:
    """Decides how every tensor of a model is stored.

    Args:
        experts: base and experts, opened.
        settings: of the quantizer.

    Raises:
        InputError: the model has no blocks with linear layers, such as a network of convolutions.
    """

    def __init__(self, experts: ExpertSet, settings: QuantizeSettings) -> None:
        self._experts, self._settings = experts, settings
        self._blocks = dict(block_linears(experts.model))
        if not self._blocks:
            model = type(experts.model).__name__
            raise InputError(f"{model} has no list of repeated blocks with linear layers to quantize: use method: none")
        self._modules = dict(experts.model.named_modules())
        self._routers = set(routers(experts.model))
        self._beside = beside_language(experts.model)
        self._aliases: dict[str, list[str]] = {name: [name] for name in experts.names}
        for name, leader in experts.tied.items():
            self._aliases.setdefault(leader, [leader]).append(name)

    def layout(self, late: Sequence[str] | None = None, unread: Sequence[str] = ()) -> Layout:
        """The layout.

        Args:
            late: modules after the last block that calibration data reaches, in the order of their calls; None where
                there is no data, and nothing outside the blocks is solved.
            unread: those of them that no head reads.

        Raises:
            InputError: a pattern matches nothing, tied tensors have two settings, or a group does not divide a
                tensor's columns; the field is named.
        """
        parts = {layer: part for layer in self._layers if (part := self._part(layer)) is not None}
        chosen = self._overridden(parts)
        of = {name: self._rest(name) for name in self._experts.names}
        dropped = tuple(name for name in of if self._settings.drop_unused and name.rpartition(".")[0] in unread)
        reached = [] if late is None else [*(layer for layer in late if layer not in self._output), *self._output]
        solvable = [layer for layer in reached if layer in parts and layer not in unread]
        late = [layer for layer in solvable if not self._kept(chosen[layer], parts[layer])]
        for layer, part in parts.items():
            grid, kept = self._grid(layer, part, chosen[layer]), self._kept(chosen[layer], part)
            if not (kept and part.beside and chosen[layer] is None):  # which is stored as norms are
                of[f"{layer}.weight"] = self._matrix(layer, grid, (part.in_block or layer in late) and not kept)
        output = next((layer for layer in self._output if layer in late), None)
        of = {name: storage for name, storage in of.items() if name not in dropped}
        free = {layer: grids for layer, part in parts.items() if (grids := self._choices(layer, part, chosen[layer]))}
        free = {layer: grids for layer, grids in free.items() if f"{layer}.weight" in of}
        return Layout(of, tuple(late), output, dropped, self._settings.scales == "search", free)

    @cached_property
    def _layers(self) -> list[str]:
        """All modules with a matrix that may be quantized, by the name of the tensor that leads."""
        return [name.removesuffix(".weight") for name in self._experts.names if name.endswith(".weight")]

    @cached_property
    def _output(self) -> list[str]:
        """The output layer of a language model, where it is a tensor of its own."""
        names = [name for name in self._experts.output_layer() if name in self._experts.names]
        return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]

    def _part(self, layer: str) -> _Part | None:
        """What a module's weight is to the quantizer; None if it is none that is quantized."""
        settings = self._settings
        if layer in self._routers:
            return None
        if layer in self._beside:
            return _Part(None, "group_size", in_block=layer in self._blocks, beside=True)
        if layer in self._blocks:
            return _Part(settings.block_grid, "group_size", in_block=True)
        aliases = [alias.removesuffix(".weight") for alias in self._aliases[f"{layer}.weight"]]
        if self._tables.intersection(aliases):
            return self._table(aliases)
        if layer in self._output:
            return _Part(settings.part_grid(settings.output_layer), "output_layer")
        if isinstance(self._modules.get(layer), LINEAR) and not self._in_block(layer):
            grid, columns = settings.block_grid, self._shape(layer)[1]
            if grid is not None and grid.group_size != -1 and columns % grid.group_size:
                grid = replace(grid, group_size=-1)
            return _Part(grid, "group_size")
        return None

    def _table(self, aliases: Sequence[str]) -> _Part:
        """A table of tokens, which may be the output layer as well."""
        settings, output = self._settings, {name.removesuffix(".weight") for name in self._experts.output_layer()}
        tied, table, own = output & set(aliases), settings.embeddings, settings.output_layer
        if not tied or own is None:
            return _Part(settings.part_grid(table), "embeddings")
        if table is not None and settings.part_grid(table) != settings.part_grid(own):
            name = min(tied)
            raise InputError(f"quantize.output_layer: {name} is tied to {aliases[0]}: one tensor has one setting")
        return _Part(settings.part_grid(own), "output_layer")

    @cached_property
    def _tables(self) -> set[str]:
        """Embeddings with a row a token. Where others have as many rows, those that grow with the vocabulary."""
        experts = self._experts
        rows, named = vocabulary(experts.model), dict[str, nn.Embedding]()
        for name, module in self._modules.items():
            if isinstance(module, nn.Embedding) and module.num_embeddings == rows and not self._in_block(name):
                named[name] = module
        if rows is None or len({experts.tied.get(f"{name}.weight", f"{name}.weight") for name in named}) < 2:
            return set(named)
        grown = token_tables(experts.model, experts.meta_model(rows + 1))
        return {name for name in named if f"{name}.weight" in grown}

    def _in_block(self, layer: str) -> bool:
        return layer.startswith(tuple(f"{stack.name}." for stack in find_stacks(self._experts.model)))

    def _shape(self, layer: str) -> tuple[int, int]:
        """[out, in] of a layer's or a table's weight."""
        shape, module = self._experts.base.shape(f"{layer}.weight"), self._modules[layer]
        rows, columns = shape[::-1] if is_transposed(module) else shape
        return rows, columns

    # --- overrides ---------------------------------------------------------------------------------------------

    def _overridden(self, parts: Mapping[str, _Part]) -> dict[str, int | None]:
        """The number of the override that each layer has, if any.

        Raises:
            InputError: an override matches no layer, or two names of one tensor have two of them.
        """
        chosen, matched = dict[str, int | None](), set[int]()
        for layer in parts:
            names = [alias.removesuffix(".weight") for alias in self._aliases[f"{layer}.weight"]]
            found = {name: [i for i, one in enumerate(self._settings.overrides) if one.matches(name)] for name in names}
            matched.update(i for numbers in found.values() for i in numbers)
            first = {numbers[0] for numbers in found.values() if numbers}
            if len({self._settings.overrides[i].model_copy(update={"layers": ""}) for i in first}) > 1:
                raise InputError(f"quantize.overrides: {' and '.join(names)} are one tensor: give them one setting")
            chosen[layer] = min(first, default=None)
        for number, override in enumerate(self._settings.overrides):
            if number not in matched:
                listed = ", ".join(list(parts)[:LISTED])
                raise InputError(
                    f"quantize.overrides.{number}.layers: {override.layers!r} matches no layer, of which there are "
                    f"{len(parts)}, such as {listed}; a regular expression begins with re:"
                )
        return chosen

    def _kept(self, number: int | None, part: _Part) -> bool:
        """Whether a layer stays as it is merged, and gets no target."""
        override = None if number is None else self._settings.overrides[number]
        if override is not None:
            return override.skip
        return part.beside or (part.grid is None and part.field == "output_layer")

    def _grid(self, layer: str, part: _Part, number: int | None) -> Grid | None:
        """The grid of a layer, which its columns are checked against."""
        override = None if number is None else self._settings.overrides[number]
        grid, field = part.grid, f"quantize.{part.field}"
        if override is not None:
            grid, field = override.grid(part.grid or self._settings.block_grid), f"quantize.overrides.{number}"
        if grid is not None:
            with error_context(f"{field}: {layer}"):
                grid.width(self._shape(layer)[1])
        return grid

    def _choices(self, layer: str, part: _Part, number: int | None) -> tuple[Grid, ...]:
        """The grids among which one is chosen for a layer under a limit of size; none where its bits are given."""
        settings, override = self._settings, None if number is None else self._settings.overrides[number]
        if settings.budget is None and settings.size is None:
            return ()
        if part.beside if override is None else override.skip or override.bits is not None:
            return ()
        if part.field != "group_size" and getattr(settings, part.field) is not None:
            return ()
        own, columns = self._grid(layer, part, number) or Grid(), self._shape(layer)[1]
        if part.field == "group_size" or override is not None:
            coarser = [replace(own, bits=BITS[0], group_size=COARSE)] if -1 < own.group_size < COARSE else []
            grids = [*coarser, *(replace(own, bits=bits) for bits in BITS)]
        else:  # groups that bits have by default, and those of the blocks
            parts = [PartGrid(bits=bits, group_size=size) for bits in BITS for size in (settings.group_size, None)]
            grids = [grid for one in parts if (grid := one.grid(settings.symmetric)) is not None]
            grids = [grid for grid in grids if grid.group_size != -1 or grid.bits == BITS[-1]]
        fitting = [grid for grid in grids if columns % max(grid.group_size, 1) == 0]
        return tuple(dict.fromkeys(fitting or (replace(own, bits=bits, group_size=-1) for bits in BITS)))

    # --- dtypes --------------------------------------------------------------------------------------------------

    def _matrix(self, layer: str, grid: Grid | None, solved: bool) -> Storage:
        """How a matrix is stored, on a grid or as it was."""
        stored = self._experts.base.dtype(f"{layer}.weight")
        scale = _dtype_of(self._settings.scale_dtype, stored)
        if grid is None or stored is None or scale is None:
            return Storage(stored, None, None, solved)
        return Storage(stored, grid, scale, solved)

    def _rest(self, name: str) -> Storage:
        """How a tensor is stored that is not quantized; buffers are no weights, and stay as they are."""
        stored, module = self._experts.base.dtype(name), self._modules[name.rpartition(".")[0]]
        if name.rpartition(".")[2] in module._buffers or self._settings.bits == PLAIN:
            return Storage(stored)
        return Storage(_dtype_of(self._settings.rest, stored))


def _dtype_of(setting: str, stored: torch.dtype | None) -> torch.dtype | None:
    """The dtype that a setting gives what is stored in another one; None for what is no float."""
    if stored is None or setting == "as-stored":
        return stored
    if setting == "auto":
        return torch.float16 if stored in (torch.float32, torch.float64) else stored
    dtype: torch.dtype = getattr(torch, setting)
    return dtype


def stored_parts(layout: Layout, experts: ExpertSet) -> dict[str, str]:
    """Part of a model → how its weights are stored, in words, what most of it is first."""
    found: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    blocks = tuple(f"{stack.name}." for stack in find_stacks(experts.model))
    tokens, output = vocabulary(experts.model), experts.output_layer()
    for name, storage in layout.of.items():
        module, size = experts.model.get_submodule(name.rpartition(".")[0]), prod(experts.base.shape(name))
        table = isinstance(module, nn.Embedding) and (storage.grid is not None or module.num_embeddings == tokens)
        part = TABLES if table else OUTPUT if name in output else OUTSIDE
        if storage.grid is None and not storage.solved and part == OUTSIDE:
            part = REST
        elif name.startswith(blocks):
            part = BLOCKS
        grid = None if storage.grid is None else asdict(storage.grid)
        text = describe(grid) if grid else str(storage.dtype).removeprefix("torch.")
        if choices := layout.free.get(name.removesuffix(".weight")):
            text = f"{choices[0].bits} to {choices[-1].bits} bits, chosen layer by layer"
        if storage.dtype is not None:
            found[part][text] += size
    return {part: "; ".join(text for text, _ in sizes.most_common()) for part, sizes in found.items() if sizes}


def fit_dtypes(layout: Layout, experts: ExpertSet, merged: MergedWeights, setting: str) -> Layout:
    """The layout with all that float16 cannot hold in its own dtype.

    Raises:
        InputError: a tensor is too large for the dtype that the recipe asks for by name; it is named.
    """
    of = dict(layout.of)
    for name, storage in layout.of.items():
        stored = experts.base.dtype(name)
        if storage.dtype != torch.float16 or stored == torch.float16 or storage.grid is not None or stored is None:
            continue
        largest = max((float(part.abs().max()) for part in merged.parts(name) if part.numel()), default=0.0)
        if largest > torch.finfo(torch.float16).max:
            if setting != "auto":
                raise InputError(f"quantize.rest: {name} reaches {largest:.3g}, more than {setting} holds")
            of[name] = replace(storage, dtype=stored)
            experts.notes.append(f"{name} reaches {largest:.3g}, more than float16 holds: it is stored as it was")
    return replace(layout, of=of)
