import json
import random
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
from epmq.models.checkpoint import DTYPES, INDEX, SINGLE, TensorSpec
from epmq.models.writer import CheckpointWriter

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def written(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2 << 30) -> Path:
    """A checkpoint directory as the writer makes it."""
    folder.mkdir(exist_ok=True)
    with CheckpointWriter(folder, specs_of(tensors), shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
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
    dtypes=st.lists(
        st.sampled_from([torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.bool]), min_size=8, max_size=8
    ),
    seed=st.integers(0, 1000),
    reread=st.booleans(),
)
def test_tensors_in_any_order_become_the_file_that_one_save_writes(sizes, dtypes, seed, reread):
    folder = Path(tempfile.mkdtemp())
    tensors = {f"t{i}": torch.randn(n, 3).to(dtype) for i, (n, dtype) in enumerate(zip(sizes, dtypes))}
    order = list(tensors)
    random.Random(seed).shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("epmq.models.writer.HELD", 16)
        with CheckpointWriter(folder, specs_of(tensors), reread=reread) as writer:
            for name in order:
                writer.write(name, iter(tensors[name].split(2)))
            writer.finish()
    assert [file.name for file in folder.iterdir()] == [SINGLE]
    save_file(tensors, folder / "whole", metadata={"format": "pt"})
    assert (folder / SINGLE).read_bytes() == (folder / "whole").read_bytes()
    content = (folder / SINGLE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert ["__metadata__", *writer.order] == list(header)


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
    for shard in shards:
        save_file(load_file(sharded / shard), tmp_path / shard, metadata={"format": "pt"})
        assert (sharded / shard).read_bytes() == (tmp_path / shard).read_bytes()


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    stacked = torch.randn(6, 4)
    folder = written(tmp_path / "model", {"top": stacked[:2], "below": stacked[2:], "across": stacked.T})
    read = load_file(folder / SINGLE)
    assert torch.equal(read["top"], stacked[:2]) and torch.equal(read["across"], stacked.T)
    assert torch.equal(read["below"], stacked[2:])


def test_a_writer_goes_on_with_what_is_there(tmp_path):
    tensors = some_tensors()
    whole, specs = written(tmp_path / "whole", tensors, shard_bytes=40), specs_of(tensors)
    folder = tmp_path / "model"
    folder.mkdir()
    first, *others = tensors
    with CheckpointWriter(folder, specs, shard_bytes=40) as writer:
        writer.write(first, tensors[first])
        writer.write(others[0], torch.zeros_like(tensors[others[0]]))  # written over below
        writer.sync()
    with CheckpointWriter(folder, specs, shard_bytes=40) as writer:
        assert torch.equal(writer.tensor(first), tensors[first])
        for name in others:
            writer.write(name, tensors[name])
        assert all(torch.equal(writer.tensor(name), tensor) for name, tensor in tensors.items())
        writer.finish()
    assert len(writer.files) > 1
    for file in [*writer.files, INDEX]:
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_empty_tensors_are_read_back(tmp_path):
    empty = torch.empty(0, 3, dtype=torch.int8)
    with CheckpointWriter(tmp_path, specs_of({"empty": empty})) as writer:
        writer.write("empty", empty)
        read = writer.tensor("empty")
    assert read.shape == empty.shape and read.dtype == empty.dtype


@pytest.mark.parametrize("rows", [[1], [2, 2], [2, 1, 1], []])
def test_a_tensor_that_is_too_long_or_too_short_is_named_and_harms_no_other(tmp_path, rows):
    tensors = {name: torch.randn(3, 4) for name in "abc"}
    with CheckpointWriter(tmp_path, specs_of(tensors)) as writer:
        for name in "abc":
            writer.write(name, tensors[name])
        size = 16 * sum(rows)
        with pytest.raises(ValueError, match=rf"tensor 'b' has {size} bytes, not the 48 expected"):
            writer.write("b", (torch.ones(count, 4) for count in rows))
        assert torch.equal(writer.tensor("a"), tensors["a"]) and torch.equal(writer.tensor("c"), tensors["c"])
