"""Read back what was written, before it appears, and hold it against the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.models.blocks import as_matrix
from epmq.models.checkpoint import Checkpoint
from epmq.models.hooks import first_tensor
from epmq.models.loading import plain_tensors
from epmq.models.meta import build_meta_model, load_outside, materialize, rename, set_tensor, tied_names, to_meta
from epmq.pipeline.journal import Block

# Largest difference over largest value that may come of another order of sums.
TOLERANCE = 1e-3


def check_reloaded(folder: Path, batch: Batch, wanted: Tensor) -> None:
    """Check that a checkpoint gives what the model in memory gave.

    Args:
        folder: what was written.
        batch: model inputs; where they are is where the checkpoint is run.
        wanted: what the last block of the model in memory gave on them, [..., hidden].

    Raises:
        RuntimeError: it gives something else; by how much is said.
    """
    found = reloaded_output(folder, batch)
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if not off <= TOLERANCE:  # nor NaN
        raise RuntimeError(
            f"{folder}: read back, it gives other outputs than the model in memory (off by {off:.2g} of the largest), "
            "so it is not what was quantized; nothing was published"
        )


def check_stored(folder: Path, blocks: Iterable[Block], model: nn.Module) -> None:
    """Check every quantized layer of a checkpoint against its codes, where no data is there to run it on.

    Args:
        folder: what was written.
        blocks: of the run, with the codes of their layers.
        model: has the layers, by the names that they have in the blocks.

    Raises:
        RuntimeError: a layer is another one, or not finite; it is named.
    """
    checkpoint = Checkpoint(folder)
    quantization = checkpoint.config.pop("quantization_config", None)
    _, read = _plain(checkpoint, build_meta_model(checkpoint), quantization)
    for name, weight in ((name, weight) for block in blocks for name, weight in block.layers.items()):
        found = as_matrix(model.get_submodule(name), read(f"{name}.weight")).float()
        wanted = weight.dequantize().float()
        if not torch.isfinite(wanted).all():
            raise RuntimeError(f"{name}: weights are not finite when quantized; nothing was published")
        if float((found - wanted).abs().max()) > TOLERANCE * float(wanted.abs().max()):
            raise RuntimeError(f"{folder}: read back, {name} is not what was quantized; nothing was published")


def reloaded_output(folder: Path, batch: Batch) -> Tensor:
    """What the last block of a checkpoint gives on a batch, [..., hidden], with one block in memory at a time."""
    checkpoint = Checkpoint(folder)
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    quantization = checkpoint.config.pop("quantization_config", None)
    model = build_meta_model(checkpoint)
    names, read = _plain(checkpoint, model, quantization)
    tied = {name: leader for name, leader in tied_names(model).items() if name not in names}
    for name, tensor in model.state_dict().items():
        if name not in names and name not in tied:
            set_tensor(model, name, torch.zeros(tensor.shape, device=device))
    walk = SequentialCalibrator(model, [batch])
    inside = tuple(stack.name + "." for stack in walk.stacks)
    load_outside(model, [name for name in names if not name.startswith(inside)], read, device, tied)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for step in walk:
        materialize(model, [name for name in names if name.startswith(step.name + ".")], read, device)
        step.finish()
        to_meta(step.block)
    return first_tensor(walk.stacks[-1].outputs[0])


def _plain(
    checkpoint: Checkpoint, model: Any, quantization: dict[str, Any] | None
) -> tuple[list[str], Callable[[str], Tensor]]:
    """The model's names of the tensors that a checkpoint has, and what reads one of them, unpacked."""
    readers = plain_tensors(checkpoint, quantization or {})
    stored, _ = rename(model, readers)
    return list(stored), lambda name: readers[stored[name]]()
