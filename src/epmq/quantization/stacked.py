"""Layers that share an input, and so a Hessian: their targets are solved together, each on its own grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from epmq.quantization.factor import Factor
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid, QuantizedTensor, join_rows
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import rtn_fallback


@dataclass(frozen=True)
class Part:
    """One of stacked layers.

    Attributes:
        rows: how many it has.
        grid: None leaves the target unrounded.
        dtype: in which the weight is read back.
        scale: dtype of the scales.
    """

    rows: int
    grid: Grid | None
    dtype: torch.dtype
    scale: torch.dtype = torch.float32


@dataclass(frozen=True)
class Solved:
    """What became of a layer.

    Attributes:
        weight: [out, in] as it is read back, in the dtype of the part.
        codes: None without a grid.
        loss: tr((Q − W*) H (Q − W*)ᵀ).
        rounded: rows that are rounded to nearest after all, see `rtn_fallback`.
    """

    weight: Tensor
    codes: QuantizedTensor | None
    loss: float
    rounded: int = 0


def join_solved(pieces: Sequence[Solved]) -> Solved:
    """A layer that was solved some rows at a time, put together."""
    if len(pieces) == 1:
        return pieces[0]
    weight = torch.cat([piece.weight for piece in pieces])
    codes = [piece.codes for piece in pieces if piece.codes is not None]
    loss, rounded = sum(piece.loss for piece in pieces), sum(piece.rounded for piece in pieces)
    return Solved(weight, join_rows(codes) if codes else None, loss, rounded)


def solve(target: Tensor, factor: Factor, hessian: Tensor, parts: Sequence[Part], search: bool) -> list[Solved]:
    """Choose codes for stacked layers, and hold them against rounding to nearest.

    Rows know nothing of each other: those on one grid are solved together.

    Args:
        target: W* [out, in] float32 of all layers.
        factor, hessian: H [in, in] float32 and its factor.
        parts: the layers, in the order in which they are stacked.
        search: search the scales, see `gptq`.

    Raises:
        ValueError: scales or losses are not finite.
    """
    split = torch.split(target, [part.rows for part in parts])
    solved: dict[int, Solved] = {}
    for part in dict.fromkeys(replace(part, rows=0) for part in parts):
        members = [number for number, one in enumerate(parts) if replace(one, rows=0) == part]
        rows = target if len(members) == len(parts) else torch.cat([split[number] for number in members])
        sizes = [parts[number].rows for number in members]
        solved |= zip(members, _on_one_grid(rows, factor, hessian, part, sizes, search))
    return [solved[number] for number in range(len(parts))]


def _on_one_grid(
    target: Tensor, factor: Factor, hessian: Tensor, part: Part, sizes: list[int], search: bool
) -> list[Solved]:
    if part.grid is None:
        weight = target.to(part.dtype)
        losses = torch.split(hessian_loss(weight.float() - target, hessian), sizes)
        return [Solved(one, None, float(loss.sum())) for one, loss in zip(torch.split(weight, sizes), losses)]
    codes, loss = gptq(target, factor, part.grid, search=search, scale_dtype=part.scale)
    codes.dtype = part.dtype
    codes, loss, rounded = rtn_fallback(codes, loss, target, hessian)
    split = zip(codes.split(sizes), torch.split(loss, sizes), torch.split(rounded, sizes))
    return [Solved(one.dequantize(), one, float(own.sum()), int(exchanged.sum())) for one, own, exchanged in split]
