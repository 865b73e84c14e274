import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, some_tensors
from conftest import tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertModel

from epmq.files import write_json
from epmq.models.checkpoint import INDEX, SINGLE
from epmq.models.writer import CheckpointWriter, copy_processor


def written(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2 << 30) -> Path:
    """A checkpoint directory as the writer makes it."""
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    write_json(folder / "config.json", CONFIG)
    return folder


@pytest.mark.parametrize("shard_bytes", [2 << 30, 30_000])
def test_transformers_reads_what_is_written(tmp_path, shard_bytes):
    model = tiny_bert()
    written(tmp_path / "model", model.state_dict(), shard_bytes)
    write_json(tmp_path / "model" / "config.json", model.config.to_dict())
    read = BertModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    kinds=st.lists(st.sampled_from([torch.float64, torch.bfloat16, torch.int8, torch.int32]), min_size=8, max_size=8),
    part_bytes=st.integers(1, 60),
    copied=st.integers(1, 40),
)
def test_parts_become_the_file_that_one_save_writes(sizes, kinds, part_bytes, copied):
    folder = Path(tempfile.mkdtemp())
    tensors = {f"t{i}": torch.randn(n).to(kind) for i, (n, kind) in enumerate(zip(sizes, kinds))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("epmq.models.writer.COPIED", copied)
        writer = CheckpointWriter(folder, part_bytes=part_bytes)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    assert [file.name for file in folder.iterdir()] == [SINGLE]
    save_file(tensors, folder / "whole", metadata={"format": "pt"})
    assert (folder / SINGLE).read_bytes() == (folder / "whole").read_bytes()


def test_shards_hold_what_they_should(tmp_path):
    tensors = some_tensors()
    sharded = written(tmp_path / "sharded", tensors, shard_bytes=40)
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] and count > 1
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(sharded / shard)[name], tensors[name])
    assert sorted(file.name for file in sharded.iterdir()) == sorted([*shards, INDEX, "config.json"])


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    stacked = torch.randn(6, 4)
    folder = written(tmp_path / "model", {"top": stacked[:2], "rest": stacked[2:], "across": stacked.T})
    found = load_file(folder / SINGLE)
    assert torch.equal(found["top"], stacked[:2]) and torch.equal(found["across"], stacked.T)
    assert torch.equal(found["rest"], stacked[2:])


def test_a_tensor_is_written_once(tmp_path):
    writer = CheckpointWriter(tmp_path, shard_bytes=1)
    writer.add("a", torch.ones(2))
    with pytest.raises(ValueError, match="'a' is written twice"):
        writer.add("a", torch.ones(2))


def test_processor_files_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "preprocessor_config.json", "modeling_evil.py", "model.safetensors"):
        (source / name).write_text(name)
    copy_processor(source, target)
    assert sorted(os.listdir(target)) == ["preprocessor_config.json", "tokenizer.json", "vocab.txt"]
    assert (target / "vocab.txt").read_text() == "vocab.txt"
