"""Read back what was written, before it appears, and hold it against the model in memory."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq.calibration.calls import BlockCalls
from epmq.calibration.repeated import calibrator_of
from epmq.calibration.sequential import Batch
from epmq.calibration.teacher import NO_CALLS
from epmq.data.processors import load_processor
from epmq.data.same_processor import difference
from epmq.errors import InputError
from epmq.files import write_json
from epmq.merging.experts import ExpertSet
from epmq.models.checkpoint import Checkpoint
from epmq.models.hooks import first_tensor
from epmq.models.initial import fill_absent, initial_values
from epmq.models.loading import plain_tensors, stored_dtype
from epmq.models.meta import build_meta_model, load_outside, materialize, rename, tied_names, to_meta
from epmq.models.side_files import WEIGHTS, copy_files
from epmq.pipeline.processor import OutputProcessor, write_processor

# Largest difference over largest value that may come of another order of sums.
TOLERANCE = 1e-3
# How the name begins of the temporary folder that a processor is opened from.
OPENED = "epmq-processor-"
LOST = "the processor is another one when opened from the files that go into the output"


class WrongOutputError(RuntimeError):
    """What was written is not what was quantized: a bug, a broken disk or broken memory."""


def check_reloaded(folder: Path, inputs: dict[str, Any], output: Tensor, calls: BlockCalls = NO_CALLS) -> None:
    """Check that the checkpoint in a folder gives what the last block of the model in memory gave, [..., hidden].

    `calls` is how the model calls its blocks.

    Raises:
        WrongOutputError: it gives something else; by how much is said.
    """
    error = (reloaded_output(folder, inputs, calls) - output).abs().max() / output.abs().max().clamp(min=1e-12)
    if not float(error) <= TOLERANCE:  # nor NaN
        raise WrongOutputError(
            f"{folder}: read back, it gives other outputs than the model in memory (off by {float(error):.2g} of the "
            "largest), so it is not what was quantized; nothing was published"
        )


def reloaded_output(folder: Path, inputs: dict[str, Any], calls: BlockCalls = NO_CALLS) -> Tensor:
    """What the last block of a checkpoint gives on a batch, [..., hidden], on the device where the batch is.

    One block is in memory at a time, unless blocks are called repeatedly.
    """
    checkpoint = Checkpoint(folder)
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    dtype = stored_dtype(checkpoint.config)
    readers = plain_tensors(checkpoint, checkpoint.config.pop("quantization_config", None) or {}, dtype)
    model = build_meta_model(checkpoint)
    names, _ = rename(model, readers)

    def read(name: str) -> Tensor:
        stored = names[name]
        return readers[stored]() if stored in readers else checkpoint.tensor(stored)  # a piece of one of them

    tied = {name: leader for name, leader in tied_names(model).items() if name not in names}
    absent = [name for name in model.state_dict() if name not in names and name not in tied]
    fill_absent(model, absent, initial_values(model, absent), device)
    calibrator = calibrator_of(model, [Batch("", 0, inputs)], calls)
    inside = tuple(stack.name + "." for stack in calibrator.stacks)
    load_outside(model, [name for name in names if not name.startswith(inside)], read, device, tied)
    for name in names if calls.repeated else ():
        if name.startswith(inside):
            materialize(model, [name], read, device)
    for step in calibrator:
        materialize(model, [name for name in names if name.startswith(step.name + ".")], read, device)
        step.finish()
        if step.lockstep:
            to_meta(step.block)
    return first_tensor(calibrator.first_output)


def opened_from(files: dict[str, Path], experts: ExpertSet, plan: OutputProcessor) -> Any:
    """The processor as it will be opened from the output: from its files beside the weights, and its config alone.

    Args:
        files: the `side_files` of the base.
        plan: the processor of the run, and what is written of it.

    Raises:
        InputError: it cannot be opened from these, or does something else than that of the run.
    """
    if plan.processor is None:
        return None
    with tempfile.TemporaryDirectory(prefix=OPENED) as folder:
        copy_files(files, Path(folder), leave_out=WEIGHTS)
        write_json(Path(folder, "config.json"), experts.config)
        write_processor(plan, experts, Path(folder))
        try:
            written = load_processor(folder)
        except InputError as error:
            raise InputError(f"{experts.base.path}: {LOST} ({str(error).removeprefix(folder)})") from None
    what = difference(plan.processor, written, shared=experts.shares_part)
    if what is not None:
        raise InputError(f"{experts.base.path}: {LOST} ({what})")
    return written


def check_processor(folder: Path, experts: ExpertSet, processor: Any) -> None:
    """Check that the processor in an output does what `processor`, that of the run, does.

    Raises:
        WrongOutputError: it does something else; what is said.
    """
    what = difference(processor, load_processor(folder), shared=experts.shares_part)
    if what is not None:
        raise WrongOutputError(f"{folder}: {LOST} ({what}); nothing was published")
