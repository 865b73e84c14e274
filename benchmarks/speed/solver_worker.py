"""Times epmq's solver and the peers' in one process: runs in the peers' interpreter, started by `solver`.

Everybody gets the same weight and the same Hessian, accumulated already, and one thread. What is timed: damping,
ordering, factor and rounding; with us and with GPTQModel the scales too, which llm-compressor takes as an argument.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq import matmul as products
from epmq.quantization.gptq import gptq
from epmq.quantization.grid import Grid, QuantizedTensor
from epmq.quantization.hessian import hessian_loss

GRID = Grid(bits=4, group_size=128, symmetric=True)
DAMPING = 0.01
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (4096, 11008))
TOKENS = 4096
# Rounds by columns, over what is asked for: a short run is disturbed more easily, and a long one takes minutes.
FEW, MANY = 1024, 8192
Result = Tensor | QuantizedTensor
Solver = Callable[[Tensor, Tensor], Callable[[], Result]]


def ours(weight: Tensor, hessian: Tensor) -> Callable[[], Result]:
    """epmq, with the damping that the peers do themselves."""

    def solve() -> QuantizedTensor:
        damped = hessian.clone()
        damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
        return gptq(weight, damped, GRID)[0]

    return solve


def llm_compressor(weight: Tensor, hessian: Tensor) -> Callable[[], Result]:
    """llm-compressor's function on a stack of one weight; it overwrites what it is given."""
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    settings = QuantizationArgs(
        num_bits=GRID.bits,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=GRID.group_size,
        actorder=ActivationOrdering.WEIGHT,
    )
    scale, zero = (part[None] for part in GRID.scales(weight))
    stacked, curvature = weight[None].clone(), hessian[None].clone()
    return lambda: quantize_weight(stacked, curvature, scale, zero, None, settings, 128, DAMPING)[0][0]


def gptqmodel(weight: Tensor, hessian: Tensor) -> Callable[[], Result]:
    """GPTQModel's task for one layer, handed its Hessian, with groups that stay where they are."""
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    settings = QuantizeConfig(
        bits=GRID.bits,
        group_size=GRID.group_size,
        sym=True,
        desc_act=True,
        act_group_aware=False,
        static_groups=True,
        damp_percent=DAMPING,
    )
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight.data = weight.clone()
    task = GPTQ(layer, settings)
    task.quantizer.configure(perchannel=True)
    task.H, task.nsamples = hessian.clone(), TOKENS
    return lambda: task.quantize()[0]


PEERS: dict[str, Solver] = {"llmcompressor": llm_compressor, "gptqmodel": gptqmodel}


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """What it took: processor time (all of it is one thread's, and others may be using the machine), or on an
    accelerator the time until it is done."""
    gc.collect()
    if device.type == "cpu":
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random weight, and the Hessian of random inputs some of which are far larger than others."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(TOKENS, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    return weight.to(device), (inputs.T @ inputs / TOKENS).to(device)


def measure(rows: int, columns: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """All solvers in turn on one shape, the least time of each: one row a peer."""
    weight, hessian = layer(rows, columns, device)
    square = torch.randn(2048, 2048, device=device)
    solvers: dict[str, Solver] = {"ours": ours, **PEERS}
    times: dict[str, list[float]] = {name: [] for name in (*solvers, "product", "torch product")}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for _ in range(3):
            times["product"].append(seconds(lambda: products.matmul(square, square), device)[0])
            times["torch product"].append(seconds(lambda: square @ square, device)[0])
        for name, solver in solvers.items():
            taken, quantized = seconds(solver(weight, hessian), device)
            times[name].append(taken)
            if isinstance(quantized, QuantizedTensor):
                quantized = quantized.dequantize()
            lost = hessian_loss(quantized.to(weight) - weight, hessian).sum() / hessian_loss(weight, hessian).sum()
            errors[name] = float(lost)
    least = {name: min(taken) for name, taken in times.items()}
    # The floor is set by the fastest product there is, PyTorch's own or ours.
    usual = 2 * 2048**3 / least["torch product"]
    rate = max(usual, 2 * 2048**3 / least["product"])
    operations = columns**3 / 3 + rows * columns**2
    shared = {
        "out": rows,
        "in": columns,
        "bits": GRID.bits,
        "group_size": GRID.group_size,
        "rounds": rounds,
        "device": device.type,
        "clock": "processor" if device.type == "cpu" else "wall",
        "ours_seconds": round(least["ours"], 4),
        "hessian_error_ours": round(errors["ours"], 7),
        "floor_seconds": round(operations / rate, 4),
        "floor_ratio": round(least["ours"] / operations * rate, 2),
        "matmul_gflops": round(rate / 1e9, 1),
        "torch_floor_ratio": round(least["ours"] / operations * usual, 2),
        "torch_matmul_gflops": round(usual / 1e9, 1),
    }
    return [
        {
            **shared,
            "peer": peer,
            "peer_seconds": round(least[peer], 4),
            "ratio": round(least[peer] / least["ours"], 2),
            "hessian_error_peer": round(errors[peer], 7),
        }
        for peer in PEERS
    ]


def main() -> None:
    """Measure every shape; rows go to a file, because the peers write to standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    measure(256, 256, 1, torch.device(arguments.device))  # imports and first calls are not what is measured
    for out, columns in SHAPES[:1] if arguments.quick else SHAPES:
        rounds = 3 * arguments.rounds if columns <= FEW else arguments.rounds if columns < MANY else 1
        rows += measure(out, columns, rounds, torch.device(arguments.device))
        arguments.file.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
