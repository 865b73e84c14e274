"""Checkpoints in pickles: opened by name, as tensors, and never run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, saved, some_tensors

from epmq.files import write_json
from epmq.models.checkpoint import INDEX, Checkpoint, resolve


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(folder: Path, content: Any, name: str = "pytorch_model.bin", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    torch.save(content, folder / name, **settings)
    return folder / name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_only_by_name(tmp_path, zipped):
    """In the form that torch writes, and in the one that it wrote before 1.6."""
    tensors = some_tensors()
    path = pickled(tmp_path / "model", tensors, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle: name that file"):
        Checkpoint(path.parent)
    checkpoint = Checkpoint(path)
    assert checkpoint.path == path.parent and checkpoint.config == CONFIG
    assert checkpoint.names == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == (tensor.dtype if tensor.is_floating_point() else None)
    checkpoint.check_finite()


def test_safetensors_come_before_a_pickle_beside_them(tmp_path):
    tensors = some_tensors()
    folder = saved(tmp_path / "model", {"a": torch.zeros(2)})
    path = pickled(folder, tensors)
    assert Checkpoint(folder).names == ["a"] and Checkpoint(path).names == list(tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped):
    trap = {"a": torch.ones(2), "b": Trap(tmp_path / "sprung")}
    path = pickled(tmp_path / "model", trap, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable pickle of tensors"):
        Checkpoint(path)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("content", [[1], {"state_dict": {"a": torch.ones(1)}}, {"a": 1.0}, torch.ones(2)])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    path = pickled(tmp_path / "model", content)
    with pytest.raises(ValueError, match=r"not a readable pickle of tensors \(it holds something else"):
        Checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"broken", b"PK\x03\x04"])
def test_a_broken_pickle_is_named(tmp_path, content):
    path = pickled(tmp_path / "model", {})
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a readable pickle of tensors"):
        Checkpoint(path)


def test_several_pickles_are_read_by_the_name_of_their_index(tmp_path):
    tensors, folder = some_tensors(), tmp_path / "model"
    names = list(tensors)
    shards = {"pytorch_model-1.bin": names[:2], "pytorch_model-2.bin": names[2:]}
    for shard, held in shards.items():
        pickled(folder, {name: tensors[name] for name in held}, shard)
    index = folder / "pytorch_model.bin.index.json"
    write_json(index, {"weight_map": {name: shard for shard, held in shards.items() for name in held}})
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin\.index\.json is a pickle: name that file"):
        Checkpoint(folder)
    checkpoint = Checkpoint(index)
    assert checkpoint.names == names and all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in names)
    index.rename(folder / INDEX)
    with pytest.raises(ValueError, match=r"safetensors\.index\.json: pytorch_model-1\.bin is a pickle"):
        Checkpoint(folder)


def test_pickles_are_fetched_from_the_hub_only_by_name(tmp_path, monkeypatch):
    tensors = some_tensors()
    path, asked = pickled(tmp_path / "model", tensors), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.bin" in allow_patterns))
        return str(path.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("owner/name") == path.parent and resolve("owner/name/pytorch_model.bin") == path
    assert Checkpoint("owner/name/pytorch_model.bin").names == list(tensors)
    assert asked == [("owner/name", False), ("owner/name", True), ("owner/name", True)]
