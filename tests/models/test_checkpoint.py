import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import CONFIG, saved, some_tensors
from conftest import tiny_bert
from safetensors.torch import load_file, save_file

from epmq.files import write_json
from epmq.models.checkpoint import HUB_PATTERNS, INDEX, SINGLE, Checkpoint, resolve


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return some_tensors()


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return saved(tmp_path / "sharded", tensors, several=True)


@pytest.mark.parametrize("several", [False, True])
def test_what_is_written_is_read(tmp_path, tensors, several):
    checkpoint = Checkpoint(saved(tmp_path / "model", tensors, several))
    assert checkpoint.names == list(tensors) and checkpoint.config == CONFIG
    assert (tmp_path / "model" / SINGLE).exists() == (not several)
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert [checkpoint.spec(name)[0] for name in "abcde"] == ["F32", "BF16", "F16", "I32", "F64"]
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


def test_the_files_of_every_tokenizer_of_transformers_are_fetched():
    sources = Path(transformers.__file__).parent.glob("models/*/tokenization*.py")
    tables = re.findall(
        r"VOCAB_FILES_NAMES\b[^{\n]*= \{([^}]*)\}", "".join(file.read_text("utf-8") for file in sources)
    )
    names = {name for table in tables for name in re.findall(r': "([^"/]+)"', table)}
    assert {"source.spm", "bpe.codes", "sentencepiece.bpe.model", "prophetnet.tokenizer"} <= names
    assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in HUB_PATTERNS)]
    assert not any(fnmatch(name, pattern) for name in ("a.py", "b.bin", "c.pkl") for pattern in HUB_PATTERNS)


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
    folder = saved(tmp_path / "model", tensors)
    for size in (0, 4, 100):
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
            Checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_found(tmp_path, value, dtype):
    bad = torch.ones(4, 3, dtype=dtype)
    bad[2, 1] = bad[0, 0] = value
    checkpoint = Checkpoint(saved(tmp_path / "model", {"good": torch.ones(2), "bad": bad}))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'bad' has 2 NaN or Inf entries"):
        checkpoint.check_finite()
    checkpoint.check_finite(["good"])


def test_large_numbers_and_empty_tensors_and_integers_are_finite(tmp_path):
    large = {
        dtype: torch.full((1000,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float16, torch.float32)
    }
    extra = {"cancel": torch.tensor([3e38, -3e38]), "empty": torch.empty(0, 3), "ids": torch.arange(3)}
    tensors = {str(dtype): tensor for dtype, tensor in large.items()} | extra
    Checkpoint(saved(tmp_path / "model", tensors)).check_finite()


def test_a_shard_that_holds_more_than_the_index_says(sharded, tensors):
    """`from_pretrained` reads what lies in the shards, whether the index names it or not."""
    shard = next(sharded.glob("model-00001*"))
    save_file({**load_file(shard), "stray": torch.ones(1)}, shard)
    assert Checkpoint(sharded).names == [*tensors, "stray"]


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
    folder = saved(tmp_path / "model", tensors)
    write_json(folder / "config.json", {**CONFIG, field: value})
    name = next(iter(value)) if field == "text_config" else field
    with pytest.raises(ValueError, match=rf"config\.json: {name}"):
        Checkpoint(folder)


def test_a_file_that_changes_while_it_is_open_is_named(tmp_path, tensors):
    checkpoint = Checkpoint(saved(tmp_path / "model", tensors))
    (tmp_path / "model" / SINGLE).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a' cannot be read"):
        checkpoint.tensor("a")
