"""Whether transformers alone will open the output, tried before anything is computed: with zeros for weights."""

import tempfile
from pathlib import Path

import torch

from epmq.files import read_json
from epmq.models.loading import why_not_direct
from epmq.models.writer import CheckpointWriter
from epmq.pipeline.output import weight_specs, write_config
from epmq.pipeline.prepare import PreparedRun


def note_unopened(run: PreparedRun) -> None:
    """Note it where transformers alone cannot open what a run will write."""
    with tempfile.TemporaryDirectory(prefix="epmq-opening-") as name:
        folder = Path(name)
        write_config(run, folder)
        config = read_json(folder / "config.json")
        if "quantization_config" not in config:
            return
        _write_zeros(run, folder)
        fault = why_not_direct(folder, config)
    if fault is not None:
        advice = "use epmq.load, or format: dequantized"
        run.experts.notes.append(f"AutoModel.from_pretrained cannot open this packed model ({fault}): {advice}")


def _write_zeros(run: PreparedRun, folder: Path) -> None:
    """Files that are as large as the output's and take no place on the disk; shapes are all that they hold."""
    with CheckpointWriter(folder, weight_specs(run)) as writer:
        for layer in run.layout.quantized():
            shape = f"{run.experts.written[f'{layer}.weight']}_shape"
            if shape in writer.specs:
                writer.write(shape, torch.tensor(run.experts.base.shape(f"{layer}.weight")))
        writer.finish()
