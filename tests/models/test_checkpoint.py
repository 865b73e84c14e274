import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertModel

from epmq.files import check_output, read_json, whole_directory, write_json
from epmq.models.checkpoint import INDEX, SINGLE, Checkpoint, resolve
from epmq.models.writer import CheckpointWriter, copy_processor

CONFIG = {"model_type": "bert"}


def written(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2 << 30) -> Path:
    """A checkpoint directory as the writer makes it."""
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    write_json(folder / "config.json", CONFIG)
    return folder


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(2, 2).half(),
        "d": torch.arange(6).int(),
        "e": torch.randn(2, 3, 4).double(),
    }


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return written(tmp_path / "sharded", tensors, shard_bytes=40)


@pytest.mark.parametrize("shard_bytes", [2 << 30, 1])
def test_what_is_written_is_read(tmp_path, tensors, shard_bytes):
    checkpoint = Checkpoint(written(tmp_path / "model", tensors, shard_bytes))
    assert checkpoint.names == list(tensors) and checkpoint.config == CONFIG
    assert (tmp_path / "model" / SINGLE).exists() == (shard_bytes > 1)
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert [checkpoint.dtype_name(name) for name in "abcde"] == ["F32", "BF16", "F16", "I32", "F64"]
    assert checkpoint.dtype("b") == torch.bfloat16 and checkpoint.dtype("d") is None
    assert "f" not in checkpoint
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(KeyError, match="no tensor 'f'"):
            ask("f")


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_what_transformers_writes_is_read(tmp_path, max_shard_size):
    model = tiny_bert()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "50KB")
    checkpoint, state = Checkpoint(tmp_path), model.state_dict()
    assert sorted(checkpoint.names) == sorted(state)
    assert all(torch.equal(checkpoint.tensor(name), state[name]) for name in state)


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


def test_shards_hold_what_they_should(sharded, tensors):
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


def test_no_directory():
    for source in ("/nowhere/at/all", "not-a-hub-id"):
        with pytest.raises(FileNotFoundError, match=f"{source}: no such directory"):
            resolve(source)


def test_a_hub_that_does_not_answer_is_a_missing_directory(monkeypatch):
    def refuse(*args, **kwargs):
        assert "*.bin" not in kwargs["allow_patterns"] and "*.py" not in kwargs["allow_patterns"]
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"owner/name: no such directory, and the Hub .*offline"):
        resolve("owner/name")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\xfa")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def only_a_pickle(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def truncated_shard(folder: Path) -> None:
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-3])


def shard_of_text(folder: Path) -> None:
    next(folder.glob("model-00002*")).write_text("version https://git-lfs.github.com/spec/v1")


def index_not_json(folder: Path) -> None:
    (folder / INDEX).write_text("nope")


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def edit_index(folder: Path, name: str, shard: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def shard_outside(folder: Path) -> None:
    shutil.copy(next(folder.glob("model-00001*")), folder.parent / "secret.safetensors")
    edit_index(folder, "a", "../secret.safetensors")


def shard_absolute(folder: Path) -> None:
    shutil.copy(next(folder.glob("model-00001*")), folder.parent / "secret.safetensors")
    edit_index(folder, "a", str(folder.parent / "secret.safetensors"))


def shard_the_parent(folder: Path) -> None:
    edit_index(folder, "a", "..")


def shard_a_number(folder: Path) -> None:
    edit_index(folder, "a", 1)


def tensor_not_in_its_shard(folder: Path) -> None:
    edit_index(folder, "z", next(folder.glob("model-00001*")).name)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (no_config, FileNotFoundError, r"config\.json: missing"),
        (config_not_json, ValueError, r"config\.json: not valid JSON"),
        (config_not_text, ValueError, r"config\.json: not valid JSON"),
        (config_a_list, ValueError, r"config\.json: expected a JSON object"),
        (no_weights, FileNotFoundError, r"sharded: no model\.safetensors"),
        (only_a_pickle, FileNotFoundError, r"pytorch_model\.bin is a pickle: name that file"),
        (missing_shard, FileNotFoundError, r"model-00002-of-\d+\.safetensors: named in .* but missing"),
        (truncated_shard, ValueError, r"model-00002-of-\d+\.safetensors: not a readable safetensors file"),
        (shard_of_text, ValueError, r"model-00002-of-\d+\.safetensors: not a readable safetensors file"),
        (index_not_json, ValueError, r"index\.json: not valid JSON"),
        (index_without_map, ValueError, r"index\.json: no 'weight_map'"),
        (shard_outside, ValueError, r"index\.json: tensor 'a' lies in '\.\./secret.*not a plain file name"),
        (shard_absolute, ValueError, r"index\.json: tensor 'a' lies in .*not a plain file name"),
        (shard_the_parent, ValueError, r"sharded/\.\.: not a readable safetensors file"),
        (shard_a_number, ValueError, r"index\.json: tensor 'a' lies in 1, which is not a plain file name"),
        (tensor_not_in_its_shard, ValueError, r"index\.json: tensor 'z' is not in model-00001"),
    ],
)
def test_a_broken_checkpoint_names_the_file(sharded, broken, error, message):
    Checkpoint(sharded)
    broken(sharded)
    with pytest.raises(error, match=message):
        Checkpoint(sharded)


def test_a_truncated_single_file_names_the_file(tmp_path, tensors):
    folder = written(tmp_path / "model", tensors)
    for size in (0, 4, 100):
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
            Checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_found(tmp_path, value, dtype):
    bad = torch.ones(4, 3, dtype=dtype)
    bad[2, 1] = bad[0, 0] = value
    checkpoint = Checkpoint(written(tmp_path / "model", {"good": torch.ones(2), "bad": bad}))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'bad' has 2 NaN or Inf entries"):
        checkpoint.check_finite()
    checkpoint.check_finite(["good"])


def test_large_numbers_and_empty_tensors_and_integers_are_finite(tmp_path):
    large = {
        dtype: torch.full((1000,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float16, torch.float32)
    }
    extra = {"cancel": torch.tensor([3e38, -3e38]), "empty": torch.empty(0, 3), "ids": torch.arange(3)}
    tensors = {str(dtype): tensor for dtype, tensor in large.items()} | extra
    Checkpoint(written(tmp_path / "model", tensors)).check_finite()


def test_a_directory_appears_whole(tmp_path):
    with whole_directory(tmp_path / "deep" / "out") as work:
        (work / "heads").mkdir()
        (work / "a").write_text("x")
        (work / "heads" / "b").write_text("y")
        (work / "a").chmod(0o600)
        assert not (tmp_path / "deep" / "out").exists()
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]
    out = tmp_path / "deep" / "out"
    assert (out / "heads" / "b").read_text() == "y"
    for path, mode in ((out, 0o755), (out / "a", 0o644), (out / "heads" / "b", 0o644)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error), whole_directory(tmp_path / "out") as work:
        (work / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"), whole_directory(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError), whole_directory(tmp_path / "out") as work:
        (work / "a").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
    assert (tmp_path / "out" / "a").read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_an_output_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to"):
        check_output(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_processor_files_are_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "preprocessor_config.json", "modeling_evil.py", "model.safetensors"):
        (source / name).write_text(name)
    copy_processor(source, target)
    assert sorted(os.listdir(target)) == ["preprocessor_config.json", "tokenizer.json", "vocab.txt"]
    assert (target / "vocab.txt").read_text() == "vocab.txt"


def test_a_shard_that_holds_more_than_the_index_says(sharded, tensors):
    """Tensors that the index does not name do not exist."""
    shard = next(sharded.glob("model-00001*"))
    save_file({**load_file(shard), "stray": torch.ones(1)}, shard)
    assert Checkpoint(sharded).names == list(tensors)


# --- pickles -----------------------------------------------------------------------------------------------------


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
def test_a_pickle_is_read_only_by_name(tmp_path, tensors, zipped):
    """In the form that torch writes, and in the one that it wrote before 1.6."""
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


def test_safetensors_come_before_a_pickle_beside_them(tmp_path, tensors):
    folder = written(tmp_path / "model", {"a": torch.zeros(2)})
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


def test_several_pickles_are_read_by_the_name_of_their_index(tmp_path, tensors):
    names, folder = list(tensors), tmp_path / "model"
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


def test_pickles_are_fetched_from_the_hub_only_by_name(tmp_path, tensors, monkeypatch):
    path, asked = pickled(tmp_path / "model", tensors), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.bin" in allow_patterns))
        return str(path.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("owner/name") == path.parent and resolve("owner/name/pytorch_model.bin") == path
    assert Checkpoint("owner/name/pytorch_model.bin").names == list(tensors)
    assert asked == [("owner/name", False), ("owner/name", True), ("owner/name", True)]


# --- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", "BertModel"),
        ("architectures", [1]),
        ("architectures", {"a": 1}),
        ("model_type", ["bert"]),
        ("quantization_config", "int4"),
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**9),
        ("text_config", {"n_layer": 10**9}),
    ],
)
def test_a_config_that_holds_something_else_is_refused(tmp_path, tensors, field, value):
    folder = written(tmp_path / "model", tensors)
    write_json(folder / "config.json", {**CONFIG, field: value})
    name = next(iter(value)) if field == "text_config" else field
    with pytest.raises(ValueError, match=rf"config\.json: {name}"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "\x00", ""]
)
def test_json_that_no_reader_takes_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,0a\\u', max_size=200).map(str.encode))
def test_json_is_an_object_or_an_error_that_names_the_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


def test_a_file_that_changes_while_it_is_open_is_named(tmp_path, tensors):
    checkpoint = Checkpoint(written(tmp_path / "model", tensors))
    (tmp_path / "model" / SINGLE).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a' cannot be read"):
        checkpoint.tensor("a")
