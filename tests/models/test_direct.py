"""Files written tensor by tensor to their place, against those that safetensors writes at once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from epmq.models.checkpoint import INDEX, SINGLE, Checkpoint
from epmq.models.direct import write_directly

# One a size: where sizes are equal, safetensors has an order of its own, which a reader does not care about.
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}


def forms(tensors):
    names = {dtype: name for name, dtype in KINDS.items()}
    return {name: (names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from(list(KINDS.values())), min_size=6, max_size=6),
    rows=st.integers(1, 3),
    held=st.integers(1, 50),
)
def test_the_file_is_the_one_that_one_save_writes(shapes, kinds, rows, held):
    folder = Path(tempfile.mkdtemp())
    tensors = {f"t{i}": torch.randn(shape).to(kind) for i, (shape, kind) in enumerate(zip(shapes, kinds))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("epmq.models.direct.HELD", held)
        parts = {name: tensor.split(rows) if tensor.ndim else [tensor] for name, tensor in tensors.items()}
        written = list(write_directly(folder, forms(tensors), parts.__getitem__))
    assert sorted(written) == sorted(tensors) and [file.name for file in folder.iterdir()] == [SINGLE]
    save_file(tensors, folder / "whole", metadata={"format": "pt"})
    assert (folder / SINGLE).read_bytes() == (folder / "whole").read_bytes()


def test_shards_are_a_checkpoint(tmp_path):
    tensors = {f"t{i}": torch.randn(4, 5) for i in range(5)}
    list(write_directly(tmp_path, forms(tensors), lambda name: [tensors[name]], shard_bytes=100))
    (tmp_path / "config.json").write_text("{}")
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 5 * 80
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint.names) == list(tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensor 'a' has 16 bytes, not the 24 expected"):
        list(write_directly(tmp_path, {"a": ("F32", (2, 3))}, lambda name: [torch.ones(2, 2)]))


def test_a_view_is_written_as_what_it_shows(tmp_path):
    turned = torch.randn(3, 4).T
    list(write_directly(tmp_path, {"a": ("F32", (4, 3))}, lambda name: [turned]))
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], turned)
