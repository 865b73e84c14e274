"""Which files beside a base's weights belong into the output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epmq.models.side_files import add_modules, copy_files, side_files


def put(folder: Path, *names: str, **contents: Any) -> Path:
    """Files in a folder, empty or with JSON in them; `__` stands for a dot."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else "x")
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def pooled(folder: Path, dense: float | None = None, **pooling: bool) -> Path:
    """sentence-transformers' modules in a folder, with or without one that has weights."""
    paths = ["", "1_Pooling", *([] if dense is None else ["2_Dense"]), "3_Normalize"]
    put(folder, "1_Pooling/config.json", modules__json=[{"path": path} for path in paths])
    put(folder / "1_Pooling", config__json=pooling)
    if dense is not None:
        put(folder, "2_Dense/config.json")
        put(folder / "2_Dense", config__json={"in_features": 4, "out_features": 2})
        save_file({"linear.weight": torch.full((2, 4), dense)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_all_is_taken_that_is_nothing_else(tmp_path):
    wanted = {
        *("tokenizer.json", "sentencepiece.bpe.model", "source.spm", "bpe.codes", "dict.txt", "prophetnet.tokenizer"),
        *("tekken.json", "normalizer.json", "chat_template.jinja", "generation_config.json", "unheard.of", "LICENSE"),
        *("additional_chat_templates/tool.jinja", "1_Pooling/config.json", "qformer_tokenizer/vocab.txt"),
    }
    weights = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "x.gguf", "onnx/model.onnx", "a.pt")
    others = ("modeling.py", "README.md", "config.json", "report.json", "trainer_state.json", "adapter_config.json")
    more = (".gitattributes", ".git/HEAD", "checkpoint-5/tokenizer.json", "checkpoint-5/optimizer.pt", "data/a.csv")
    exported = ("openvino/tokenizer.json", "heads/one.safetensors", "hf_quant_config.json", "training_args.bin")
    put(tmp_path, *wanted, *weights, *others, *more, *exported)
    assert side_files(tmp_path).keys() == wanted
    copy_files(side_files(tmp_path), tmp_path / "out", leave_out=(".spm",))
    copied = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert copied == wanted - {"source.spm"}


def test_another_model_in_a_folder_stays_there(tmp_path):
    put(tmp_path, "onnx/config.json", "tokenizer.json")
    put(tmp_path / "onnx", config__json={"model_type": "bert"})
    assert side_files(tmp_path).keys() == {"tokenizer.json"}


def test_modules_are_taken_with_their_weights(tmp_path):
    files = side_files(pooled(tmp_path, dense=1.0))
    assert files.keys() == {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"modules\.json: not valid JSON"),
        ('[{"path": "../x"}]', r"modules\.json: each module needs a path inside"),
        ("[1]", r"modules\.json: each module needs a path inside"),
        ('[{"path": "0_Transformer"}]', r"modules\.json: the model lies in 0_Transformer"),
    ],
)
def test_modules_that_cannot_be_are_named(tmp_path, content, message):
    put(tmp_path, "0_Transformer/config.json", modules__json=None)
    put(tmp_path / "0_Transformer", config__json={"model_type": "bert"})
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        side_files(tmp_path)


def test_modules_that_differ_are_noted(tmp_path):
    base = pooled(tmp_path / "base", dense=1.0, mean=True)
    like, unlike = pooled(tmp_path / "like", dense=1.0, mean=True), pooled(tmp_path / "unlike", dense=2.0, cls=True)
    assert list(add_modules({}, base, {"one": like})) == []
    notes = list(add_modules({}, base, {"one": like, "two": unlike}))
    assert notes == [
        f"expert two has another module {name} than the base, whose own is the output's"
        for name in ("1_Pooling", "2_Dense")
    ]
    (base / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense of modules.json has no weights" in next(add_modules({}, base, {}))


def test_modules_that_all_experts_share_are_theirs(tmp_path):
    base = put(tmp_path / "base", "tokenizer.json")
    one, two = pooled(tmp_path / "one", mean=True), pooled(tmp_path / "two", mean=True)
    put(one, "sentence_bert_config.json")
    files = side_files(base)
    (note,) = add_modules(files, base, {"one": one, "two": two})
    assert note.startswith("1_Pooling, which the base lacks")
    assert files.keys() == {"tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    three, files = pooled(tmp_path / "three", cls=True), side_files(base)
    notes = list(add_modules(files, base, {"one": one, "three": three}))
    assert files.keys() == {"tokenizer.json"} and len(notes) == 2 and "the output has none" in notes[0]
