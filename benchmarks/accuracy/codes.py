"""`python -m benchmarks.accuracy.codes`: what better codes for the same (W*, H) would save.

Takes the pairs (W*, H) of every layer of text8's expert-guided run and solves each in several ways. What counts is
tr((Q − W*) H (Q − W*)ᵀ) over all layers, over that of GPTQ as the solver has it. Writes
`benchmarks/results/codes.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.accuracy.compare import GRIDS, measure
from benchmarks.records import provenance
from benchmarks.suites import text8
from benchmarks.suites.__main__ import build
from epmq.files import write_json
from epmq.quantization import gptq as solvers
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.hessian import hessian_loss
from epmq.quantization.rtn import rtn_fallback

PATH = RESULTS / "codes.json"
Pair = tuple[Tensor, Tensor]
# Factors on the searched scales, of which each row takes the best.
FACTORS = (1.0, 0.93, 1.07)


def pairs() -> list[Pair]:
    """W* [out, in] and H [in, in] of every group of layers of the default run at 4 bits."""
    layers: list[Pair] = []

    def note(solved: QuantizedTensor, loss: Tensor, target: Tensor, hessian: Tensor) -> Any:
        layers.append((target.clone(), hessian))
        return rtn_fallback(solved, loss, target, hessian)

    with patch("epmq.quantization.stacked.rtn_fallback", note):
        fields = {"test_samples": 1, "seed": 0}
        measure(text8, build(text8), list(text8.TASKS), "task_arithmetic", {"method": "expert_guided"}, **fields)
    return layers


def descend(solved: QuantizedTensor, target: Tensor, hessian: Tensor, sweeps: int) -> Tensor:
    """Loss a row after coordinate descent: each code in turn becomes the best one, given all the others."""
    width = target.shape[1] // solved.scale.shape[1]
    step, zero = (part.float().repeat_interleave(width, 1) for part in (solved.scale, solved.zero_point))
    code = solved.codes.float() - zero
    low, high = solved.grid.lowest - zero, solved.grid.highest - zero
    gradient, curvature = (code * step - target) @ hessian, hessian.diagonal()
    for _ in range(sweeps):
        for i in torch.argsort(curvature, descending=True).tolist():
            exact = code[:, i] - gradient[:, i] / (curvature[i] * step[:, i])
            best = exact.round().maximum(low[:, i]).minimum(high[:, i])
            gradient += ((best - code[:, i]) * step[:, i])[:, None] * hessian[i]
            code[:, i] = best
    return hessian_loss(code * step - target, hessian)


def refitted(solved: QuantizedTensor, target: Tensor, hessian: Tensor, sweeps: int = 2) -> Tensor:
    """Loss a row with the scales refitted in closed form to the codes there are, a group after the other."""
    groups = solved.scale.shape[1]
    width = target.shape[1] // groups
    code = solved.codes.float() - solved.zero_point.float().repeat_interleave(width, 1)
    delta = solved.dequantize().float() - target
    for _ in range(sweeps):
        for part in (slice(i * width, (i + 1) * width) for i in range(groups)):
            own = code[:, part]
            slope, bend = (own * (delta @ hessian[:, part])).sum(1), ((own @ hessian[part, part]) * own).sum(1)
            delta[:, part] -= (slope / bend.clamp(min=1e-12))[:, None] * own
    return hessian_loss(delta, hessian)


def best_scales(solved: QuantizedTensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Loss a row where each row takes the best of a few factors on its searched scales, by its loss after GPTQ."""
    losses = []
    for factor in FACTORS:
        scales = solved.scale.float() * factor, solved.zero_point
        with patch.object(solvers, "search_scales", lambda *_, scales=scales: scales):
            losses.append(gptq(target, hessian, solved.grid, search=True)[1])
    return torch.stack(losses).amin(0)


WAYS: dict[str, Callable[[QuantizedTensor, Tensor, Tensor], Tensor]] = {
    "one sweep of coordinate descent": lambda solved, target, hessian: descend(solved, target, hessian, sweeps=1),
    "three sweeps": lambda solved, target, hessian: descend(solved, target, hessian, sweeps=3),
    "scales refitted to the codes": refitted,
    "three solves, each row's best scales": best_scales,
}


def main() -> None:
    """Read the command line, measure and write."""
    argparse.ArgumentParser(prog="python -m benchmarks.accuracy.codes", description=__doc__).parse_args()
    layers, rows = pairs(), []
    for bits, group_size, symmetric in GRIDS:
        grid, whole = Grid(bits, group_size, symmetric), 0.0
        sums = dict.fromkeys(WAYS, 0.0)
        for target, hessian in layers:
            solved, loss = gptq(target, hessian, grid, search=True)
            whole += float(loss.sum())
            for name, way in WAYS.items():
                sums[name] += float(way(solved, target, hessian).sum())
        shares = {name: value / whole for name, value in sums.items()}
        _, plain = zip(*(gptq(target, hessian, grid) for target, hessian in layers))
        shares["min–max scales instead of searched ones"] = sum(float(loss.sum()) for loss in plain) / whole
        rows.append({"bits": bits, "group_size": group_size, "symmetric": symmetric, "loss": shares})
        Console(stderr=True).print(rows[-1])
    write_json(PATH, {"suite": "text8", "layers": len(layers), "rows": rows, **provenance()})


if __name__ == "__main__":
    main()
