"""Where the layers of experts lie on disk: in matrices of their own, or in tensors of all experts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from epmq.errors import InputError
from epmq.models.mixtures import BIAS, Mixture
from epmq.models.pieces import Piece


class Origins:
    """Which tensors on disk make the fused parameters of mixtures, by transformers' own table of conversions.

    Args:
        mixtures: of the model, by their names in it.
        renamings, converters: of the model, as transformers' `get_model_conversion_mapping` gives them.

    Attributes:
        fused: name of a fused parameter in transformers' model → the mixture, and the parameter's name in it.
    """

    def __init__(self, mixtures: Mapping[str, Mixture], renamings: Sequence[Any], converters: Sequence[Any]) -> None:
        self._renamings, self._converters = renamings, converters
        self.fused: dict[str, tuple[Mixture, str]] = {}
        for path, mixture in mixtures.items():
            for name in mixture.fused_names:
                self.fused[f"{path}.{name}"] = mixture, name
                if mixture.has_bias:
                    self.fused[f"{path}.{name}{BIAS}"] = mixture, name

    def of(self, stored: str, renamed: str, pattern: str | None) -> dict[str, str]:
        """Layers whose tensors lie in one on disk: name in the model → name of the tensor, or of a piece of it.

        There are none for a matrix of an expert that the model does not have.

        Args:
            stored: name on disk.
            renamed: of the fused parameter.
            pattern: of the conversion that transformers would apply; None where there is none.

        Raises:
            InputError: it is a conversion that is not known here.
        """
        mixture, parameter = self.fused[renamed]
        path, leaf = renamed.rpartition(".")[0], "bias" if renamed.endswith(BIAS) else "weight"
        layers, turned = mixture.fused_names[parameter], mixture.is_transposed
        interleaved = mixture.interleaves and len(layers) > 1
        if pattern is None:
            return self._pieces(stored, path, mixture, layers, leaf, interleaved=interleaved, turned=turned)
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        kinds = [type(one).__name__ for one in converter.operations]
        place, sources = converter.source_patterns.index(pattern), len(converter.source_patterns)
        joined = {"MergeModulelist": 0, "Concatenate": 1}
        plain = not turned and not interleaved and leaf == "weight" and len(converter.target_patterns) == 1
        plain &= all(getattr(one, "dim", None) == joined.get(kind) for one, kind in zip(converter.operations, kinds))
        own = layers[place : place + 1] if sources == len(layers) else layers if sources == 1 else ()
        if plain and own and kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            index = self._index(stored, pattern)
            return self._of_one(stored, path, own, index) if index < mixture.count else {}
        if plain and len(own) == 1 and kinds == ["Concatenate"]:
            return self._pieces(stored, path, mixture, own, leaf)
        known = leaf == "weight" and sources == 1 and len(converter.target_patterns) == 1 and not mixture.has_bias
        one = converter.operations[0]
        if known and kinds == ["Interleave"] and one.dim == 1 and not one.inverse and not turned and not interleaved:
            return self._pieces(stored, path, mixture, layers, leaf, interleaved=True)
        if known and kinds == ["Transpose"] and {one.dim0, one.dim1} == {1, 2} and not (one.check_dims and turned):
            shape = mixture.fused_shapes()[parameter][1:] if one.check_dims else None
            form = {"interleaved": interleaved, "turned": not turned and shape is None, "unturned": shape}
            return self._pieces(stored, path, mixture, layers, leaf, **form)
        raise InputError(f"tensor {stored!r} is converted by transformers on load, which epmq does not do yet")

    def _index(self, stored: str, pattern: str) -> int:
        """The number of the expert that a matrix on disk is of."""
        from transformers.core_model_loading import apply_renamings

        name = apply_renamings(stored, list(self._renamings))
        found = re.search(pattern.replace("*.", r"(\d+)\."), name)
        if found is None:
            raise InputError(f"tensor {stored!r} is of no expert: its name holds no number")
        return int(found[1])

    @staticmethod
    def _of_one(stored: str, path: str, layers: Sequence[str], index: int) -> dict[str, str]:
        """The layers of one expert that lie in a matrix of its own."""
        if len(layers) == 1:
            return {f"{path}.{index}.{layers[0]}.weight": stored}
        pieces = [Piece(stored, part=part, parts=len(layers)) for part in range(len(layers))]
        return {f"{path}.{index}.{layer}.weight": piece.name for layer, piece in zip(layers, pieces)}

    @staticmethod
    def _pieces(
        stored: str, path: str, mixture: Mixture, layers: Sequence[str], leaf: str, **form: Any
    ) -> dict[str, str]:
        """The layers of all experts that lie in one tensor; `form` as in `Piece`."""
        return {
            f"{path}.{index}.{layer}.{leaf}": Piece(
                stored, index, mixture.count, part, len(layers), leaf=leaf, **form
            ).name
            for index in range(mixture.count)
            for part, layer in enumerate(layers)
        }
