"""Whether transformers alone will open the output, tried before anything is computed: with zeros for weights."""

import tempfile
from math import prod
from pathlib import Path

import torch

from epmq.files import read_json
from epmq.models.loading import why_not_direct
from epmq.models.mixtures import mixtures
from epmq.models.writer import CheckpointWriter
from epmq.pipeline.output import weight_specs, write_config
from epmq.pipeline.prepare import PreparedRun

# Experts of mixtures that would take more bytes than this are opened by their shapes alone.
LARGEST = 4 << 30


def note_unopened(run: PreparedRun) -> None:
    """Note it where transformers alone cannot open what a run will write."""
    with tempfile.TemporaryDirectory(prefix="epmq-opening-") as name:
        folder = Path(name)
        write_config(run, folder)
        config = read_json(folder / "config.json")
        if "quantization_config" not in config:
            return
        _write_zeros(run, folder)
        fault = why_not_direct(folder, config, shapes_only=_plain_bytes(run) > LARGEST)
    if fault is not None:
        advice = "use epmq.load, or format: dequantized"
        run.experts.notes.append(f"AutoModel.from_pretrained cannot open this packed model ({fault}): {advice}")


def _plain_bytes(run: PreparedRun) -> int:
    """Bytes of the experts of mixtures, which transformers makes plain, in 16 bits, when it opens them."""
    inside, base = tuple(f"{name}." for name in mixtures(run.experts.model)), run.experts.base
    return sum(2 * prod(base.shape(name)) for name in run.experts.names if name.startswith(inside))


def _write_zeros(run: PreparedRun, folder: Path) -> None:
    """Files that are as large as the output's and take no place on the disk; shapes are all that they hold."""
    with CheckpointWriter(folder, weight_specs(run)) as writer:
        for layer in run.layout.quantized():
            shape = f"{run.experts.written[f'{layer}.weight']}_shape"
            if shape in writer.specs:
                writer.write(shape, torch.tensor(run.experts.base.shape(f"{layer}.weight")))
        writer.finish()
