"""The merge as a reader of tensors: each is read and merged when it is asked for."""

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from epmq.merge_settings import MatrixSettings, Merge, Ties
from epmq.merging.experts import ExpertSet
from epmq.merging.low_rank import merge_factors
from epmq.merging.methods import METHODS
from epmq.merging.readers import ExpertReader
from epmq.merging.trim import Pair, magnitude_threshold, task_vector
from epmq.models.blocks import LINEAR, as_matrix
from epmq.models.checkpoint import is_finite

# Entries of a tensor that are read at once when it is merged.
ROWS = 1 << 22


class MergedWeights:
    """Tensors of the merged model; `seed` is for methods that draw."""

    def __init__(self, experts: ExpertSet, settings: Merge, seed: int = 0) -> None:
        self._experts, self._base, self._settings, self._seed = experts, experts.base, settings, seed
        self._method = METHODS[settings.method]
        self._draws = "seed" in inspect.signature(self._method.entries).parameters
        self._thresholds: list[float] | None = None

    @property
    def uses_factors(self) -> bool:
        """Whether linear layers are merged in the span of the factors of LoRA adapters."""
        readers = self._experts.experts.values()
        return self._method.matrix is not None and all(reader.adapter is not None for reader in readers)

    def prepare(self) -> None:
        """Find TIES' thresholds over the whole model now, and not when they are first needed."""
        if isinstance(self._settings, Ties) and self._settings.trim == "model":
            self._thresholds = self._find_thresholds(self._experts.names, self._settings.density)

    def tensor(self, name: str) -> Tensor:
        """A tensor, in the base's dtype. Integer buffers are the base's."""
        portions = list(self._portions(name))
        if portions == [None]:
            return next(self.parts(name))
        merged = torch.empty(self._base.shape(name), dtype=self._base.dtype(name))
        for rows, part in zip(portions, self.parts(name)):
            merged[rows] = part
        return merged

    def parts(self, name: str) -> Iterator[Tensor]:
        """As `tensor`, a large tensor some rows at a time. A weight that is NaN or Inf is named in an InputError.

        That is how it is read, too: what was read of a file is resident until its map is closed.
        """
        if self._base.dtype(name) is None:
            yield self._base.tensor(name)
            return
        layer = self._layer(name)
        if layer is not None:
            yield self._finite(name, self._merge_matrix(name, layer, self._base.tensor(name)))
            return
        merge = partial(self._method.entries, **self._arguments(name))
        for rows in self._portions(name):
            base = self._base.tensor(name, rows)
            experts = [self._of(expert, name, rows, base) for expert in self._experts.experts.values()]
            merged, new = merge(base, experts), self._new_rows(name, rows)
            # The methods that look at lengths and angles would scale these as all other rows.
            yield self._finite(name, merged if new is None else base.where(new, merged))

    def _portions(self, name: str) -> Iterator[slice | None]:
        """The rows of a tensor in portions; None for one that is merged as a whole: small, no float, or a matrix."""
        shape, whole = self._base.shape(name), self._method.whole or self._layer(name) is not None
        if whole or self._base.dtype(name) is None or math.prod(shape) <= ROWS:
            return iter([None])
        step = max(1, ROWS // math.prod(shape[1:]))
        return (slice(start, start + step) for start in range(0, shape[0], step))

    def _layer(self, name: str) -> Any:
        """The linear layer whose weight has this name, if the method sees it as a matrix."""
        path, _, leaf = name.rpartition(".")
        if self._method.matrix is None or leaf != "weight":
            return None
        module = self._experts.model.get_submodule(path)
        return module if isinstance(module, LINEAR) else None

    def _merge_matrix(self, name: str, layer: Any, base: Tensor) -> Tensor:
        """Merge the weight of a linear layer, as it is stored."""
        assert self._method.matrix is not None and isinstance(self._settings, MatrixSettings)
        readers, settings = self._experts.experts.values(), self._settings.matrix_arguments()
        factors = [found for found in (reader.factors(name) for reader in readers) if found is not None]
        if len(factors) == len(readers):
            for part in chain.from_iterable(factors):
                self._finite(name, part)  # LAPACK has its own words for what is not
            merged = merge_factors(self._method.matrix, factors, **settings)
        else:
            experts = (self._of(reader, name, None, base) for reader in readers)
            vectors = [self._finite(name, as_matrix(layer, task_vector(base, one))) for one in experts]
            merged = self._method.matrix(vectors, **settings)
        return as_matrix(layer, merged).mul(self._settings.scaling).add_(base).to(base.dtype)

    def _arguments(self, name: str) -> dict[str, Any]:
        arguments, settings = self._settings.arguments(), self._settings
        if self._draws:
            arguments |= {"seed": self._seed, "name": name}
        if isinstance(settings, Ties):
            if self._thresholds is None:
                self.prepare()
            arguments["thresholds"] = self._thresholds or self._find_thresholds([name], settings.density)
        return arguments

    def _find_thresholds(self, names: Sequence[str], density: float) -> list[float]:
        """Each expert's threshold over some tensors."""
        floats = [name for name in names if self._base.dtype(name) is not None]
        readers = self._experts.experts.values()
        return [magnitude_threshold(partial(self._pairs, expert, floats), density) for expert in readers]

    def _pairs(self, expert: ExpertReader, names: Sequence[str]) -> Iterator[Pair]:
        for name in names:
            for rows in self._portions(name):
                base = self._base.tensor(name, rows)
                yield self._finite(name, base), self._finite(name, self._of(expert, name, rows, base))

    def _of(self, expert: ExpertReader, name: str, rows: slice | None, base: Tensor) -> Tensor:
        """An expert's tensor, or some rows of it; rows of tokens that the base lacks change nothing in its mean."""
        tensor, new = expert.tensor(name, rows), self._new_rows(name, rows)
        return tensor if new is None else base.to(tensor.dtype).where(new, tensor)

    def _new_rows(self, name: str, rows: slice | None) -> Tensor | None:
        """Which rows of a table are of tokens that the base lacks; None if none are."""
        tokens = self._base.tokens
        if tokens is None or name not in tokens.tables:
            return None
        new = tokens.lacking(name, rows)
        return new if new.any() else None

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """Pass on what was made of the weights of one name, or say in an error which of them has NaN or Inf.

        Every method of merging passes them on to its result, so one look at that does for all weights.
        """
        if not is_finite(tensor):
            self._base.check_finite([name])
            for expert in self._experts.experts.values():
                expert.check_finite([name])
        return tensor
