"""What training towards the experts will cost: measured on one block of each stack, and scaled to all."""

import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.held_out import hold_out
from epmq.data.encoding import to_device
from epmq.merging.experts import ExpertSet
from epmq.models.blocks import block_linears
from epmq.models.hooks import stops_before, without_cache
from epmq.models.packed import PackedWeight
from epmq.pipeline.prepare import PreparedRun
from epmq.pipeline.refining import examples_of
from epmq.quantization.rtn import rtn
from epmq.quantize_settings import RefinedSettings
from epmq.runtime import memory_mb, peak_memory_mb, reset_peak_memory

# Weights of which it is measured how long they take to be made of codes: rows and columns.
MADE = (512, 1024)
# Tokens on which it is measured how long their scores take.
SCORED = 64


def refining_cost(run: PreparedRun, first: ExpertSet) -> tuple[float, float]:
    """Seconds and memory, beside what is resident when all is open, in MB of 10⁶ bytes.

    Args:
        run: one that is refined.
        first: its experts with one block of each stack.
    """
    settings, device = run.recipe.quantize, run.device
    assert isinstance(settings, RefinedSettings)
    parts = [hold_out(examples_of(run)[task]) for task in run.experts.experts if run.recipe.task_weight(task)]
    trained, held = ([one for part in parts for one in part[side]] for side in (0, 1))
    largest = max(trained, key=_volume)
    start = memory_mb()
    reset_peak_memory()
    forward, backward = _passes(first, to_device(largest, device), device)
    block_mb = max(peak_memory_mb() - start, 0.0)
    blocks = sum(prod(layer.weight.shape) for _, layer in _layers(run.experts))
    scale = blocks / sum(prod(layer.weight.shape) for _, layer in _layers(first))
    of_largest = [sum(map(_volume, some)) / _volume(largest) for some in (trained, held)]
    language = not all(run.experts.experts[task].has_head for task in run.calibration)
    scoring = _scoring(run, device) if language else 0.0
    epochs, made = settings.refine_epochs, _making(run) * blocks
    teaching = forward * sum(of_largest)
    training = epochs * of_largest[0] * (2 * forward + backward) + (epochs + 1) * of_largest[1] * forward
    makings = made * (3 * epochs * len(trained) + (epochs + 1) * len(held))
    # The model's scores, once more backwards, their gradient, and the expert's both times.
    scores = scoring * (5 * epochs * sum(map(_tokens, trained)) + 2 * (epochs + 1) * sum(map(_tokens, held)))
    whole = sum(prod(run.experts.base.shape(name)) for name in run.experts.names) * 4 / 1e6
    return scale * (teaching + training) + makings + scores, whole + block_mb


def _volume(inputs: dict[str, Any]) -> int:
    return sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))


def _tokens(inputs: dict[str, Any]) -> int:
    texts = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim == 2]
    return min((value.numel() for value in texts), default=0)  # of an encoder–decoder the targets, mostly


def _scoring(run: PreparedRun, device: torch.device) -> float:
    """Seconds a token in which a language model's output layer scores all tokens."""
    name = next(iter(run.experts.output_layer()), None)
    if name is None:
        return 0.0
    shape = run.experts.base.shape(run.experts.tied.get(name, name))
    weight, rows = torch.zeros(shape, device=device), torch.zeros(SCORED, shape[1], device=device)
    return min(_seconds(lambda: nn.functional.linear(rows, weight), device) for _ in range(2)) / SCORED


def _layers(experts: ExpertSet) -> list[tuple[str, Any]]:
    return list(block_linears(experts.model))


def _passes(first: ExpertSet, inputs: dict[str, Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a model's forward up to its output layer, and of its backward pass, where norms and biases learn."""
    model = first.whole_model(first.base, device)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1 and parameter.is_floating_point())
    given: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: given.append(output))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with without_cache(model):
        forward = _seconds(lambda: stops_before(model, model.get_output_embeddings(), inputs), device)
        last = given[-1]
        backward = _seconds(lambda: last.square().mean().backward(), device)
    for hook in hooks:
        hook.remove()
    return forward, backward


def _making(run: PreparedRun) -> float:
    """Seconds a weight in which codes become numbers."""
    grid = next(iter(run.layout.quantized().values()), None)
    if grid is None:
        return 0.0
    packed = PackedWeight(rtn(torch.randn(MADE), grid), kernels=False).to(run.device)
    return min(_seconds(packed.dequantize, run.device) for _ in range(3)) / prod(MADE)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Processor seconds with one thread, else the wall's clock's."""
    single = device.type == "cpu" and torch.get_num_threads() == 1
    start = time.process_time() if single else time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.process_time() if single else time.perf_counter()) - start
