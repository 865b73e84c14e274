"""Tiny pools of models and data for `tests.kit.fuzz`: each a folder with a recipe, or with a written checkpoint.

Nothing here depends on what the weights say: they are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.models.multitask import load
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe
from epmq.reporting.inspection import inspection_tables

RECIPE, OUTPUT = "recipe.yaml", "out"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "user", "assistant"]
WORDS = ["the", "cat", "dog", "sat", "ran", "mat", "tree", "red", "blue", "big"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}[SEP]{% endfor %}"
SIZE = 32
# Settings of which damage makes bad ones.
STORED: dict[str, Any] = {
    "method": "gptq",
    "bits": 4,
    "group_size": 32,
    "embeddings": {"bits": 4, "group_size": 32},
    "output_layer": {"bits": 4, "group_size": 32},
    "rest": "auto",
    "scale_dtype": "float16",
    "overrides": [{"layers": "*.0.*", "bits": 8}, {"layers": "re:.*1.*", "skip": True}],
    "drop_unused": False,
}


def open_recipe(folder: Path) -> None:
    """All that a run opens and checks before it computes."""
    prepare(load_recipe(folder / RECIPE))


def open_written(folder: Path) -> None:
    """What `epmq inspect` and `epmq.load` do with a written checkpoint."""
    inspection_tables(folder / OUTPUT, layers=True)
    load(folder / OUTPUT)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with a chat template."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    names = {"pad_token": "[PAD]", "eos_token": "[SEP]", "unk_token": "[UNK]", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **names).save_pretrained(folder)


def write_experts(folder: Path, model: PreTrainedModel, classes: int = 0) -> None:
    """The model as `base`, and moved a little as `one`; with classes, `one` has a pooled head."""
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "one")
    if classes:
        labels = [f"class {i}" for i in range(classes)]
        save_head(
            Head(torch.randn(classes, SIZE), torch.randn(classes), "mean", True, labels), folder / "one/" / HEAD_FILE
        )


def write_recipe(folder: Path, calibration: str, evaluation: str | None = None, **settings: Any) -> None:
    """A recipe with one expert."""
    expert: dict[str, Any] = {"name": "one", "model": "one", "calibration": {"path": calibration}}
    if evaluation is not None:
        expert["evaluation"] = {"path": evaluation}
    content = {"base": "base", "experts": [expert], "output": str(folder / OUTPUT), "max_length": 8, **settings}
    content["quantize"] = STORED
    (folder / RECIPE).write_text(yaml.safe_dump(content))


def sentences() -> list[dict[str, Any]]:
    return [{"text": " ".join(WORDS[i % 7 : i % 7 + 3]), "label": i % 3} for i in range(6)]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bert(**settings: Any) -> BertConfig:
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * SIZE}
    return BertConfig(vocab_size=32, max_position_embeddings=32, **sizes, **settings)


def texts(folder: Path) -> None:
    """BERT, a full expert with a pooled head, lines of JSON and csv."""
    write_experts(folder, BertModel(bert()), classes=3)
    write_tokenizer(folder / "base")
    write_lines(folder / "train.jsonl", sentences())
    rows = [f"{row['text']},{row['label']}\n" for row in sentences()]
    (folder / "test.csv").write_text("text,label\n" + "".join(rows))
    write_recipe(folder, "train.jsonl", "test.csv")


def adapters(folder: Path) -> None:
    """BERT with an adapter as expert, and parquet."""
    import pyarrow
    from pyarrow import parquet

    BertModel(bert()).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    (folder / "one").mkdir()
    pattern = "base_model.model.encoder.layer.{}.attention.self.{}.lora_{}.weight"
    shapes = {"A": (2, SIZE), "B": (SIZE, 2)}
    tensors = {
        pattern.format(layer, name, part): torch.randn(shape)
        for layer in range(2)
        for name in ("query", "value")
        for part, shape in shapes.items()
    }
    tensors |= {
        "base_model.model.classifier.weight": torch.randn(3, SIZE),
        "base_model.model.classifier.bias": torch.randn(3),
    }
    save_file(tensors, folder / "one" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "none",
    }
    names = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "use_rslora": False}
    (folder / "one" / "adapter_config.json").write_text(json.dumps({**settings, **names, "alpha_pattern": {"key": 8}}))
    parquet.write_table(pyarrow.Table.from_pylist(sentences()), folder / "train.parquet")
    write_recipe(folder, "train.parquet", "train.parquet", merge={"method": "average"})


def images(folder: Path) -> None:
    """DINOv2, an array of images, and a folder of pictures."""
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    write_experts(folder, Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **sizes)), classes=2)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "base")
    pictures = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "train.npz", images=pictures, labels=np.arange(4) % 2)
    for name, ending in (("first", "png"), ("second", "jpg")):
        (folder / "test" / name).mkdir(parents=True)
        Image.fromarray(pictures[0]).save(folder / "test" / name / f"0.{ending}")
    write_recipe(folder, "train.npz", "test")


def chats(folder: Path) -> None:
    """A language model in shards, an expert in a pickle that is named, chats."""
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 2 * SIZE}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, tie_word_embeddings=True, **sizes))
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    write_tokenizer(folder / "base")
    model.config.save_pretrained(folder / "one")
    torch.save(model.state_dict(), folder / "one" / "pytorch_model.bin")
    turns = [{"messages": [{"role": "user", "content": row["text"]}]} for row in sentences()]
    write_lines(folder / "train.jsonl", turns)
    write_lines(folder / "test.jsonl", sentences())
    write_recipe(folder, "train.jsonl", "test.jsonl")
    content = yaml.safe_load((folder / RECIPE).read_text())
    content["experts"][0]["model"] = "one/pytorch_model.bin"
    (folder / RECIPE).write_text(yaml.safe_dump(content))


def task_class(folder: Path) -> None:
    """An expert of a task class of transformers."""
    model = BertForSequenceClassification(bert(num_labels=3))
    model.bert.save_pretrained(folder / "base")
    model.save_pretrained(folder / "one")
    write_tokenizer(folder / "base")
    write_lines(folder / "train.jsonl", sentences())
    write_recipe(folder, "train.jsonl", "train.jsonl")


def written(folder: Path) -> None:
    """A packed checkpoint that epmq wrote, with a pooled head and a task class's."""
    for pool, task in ((texts, "one"), (task_class, "two")):
        (folder / task).mkdir()
        pool(folder / task)
    other = BertForSequenceClassification.from_pretrained(folder / "one" / "base", num_labels=3)
    other.save_pretrained(folder / "two" / "one")  # so that both have one base
    experts = [
        {"name": task, "model": str(folder / task / "one"), "calibration": {"path": str(folder / task / "train.jsonl")}}
        for task in ("one", "two")
    ]
    recipe = {"base": str(folder / "one" / "base"), "experts": experts, "output": str(folder / OUTPUT)}
    run({**recipe, "quantize": {"method": "rtn"}}, progress=False)


# Name → what writes the pool, what opens it, and the files of it that are damaged (patterns).
POOLS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], tuple[str, ...]]] = {
    "texts": (texts, open_recipe, ("*.*", "base/*", "one/*")),
    "adapters": (adapters, open_recipe, ("*.parquet", "one/*", "base/config.json")),
    "images": (images, open_recipe, ("*.npz", "test/*/*", "base/*", "one/config.json")),
    "chats": (chats, open_recipe, ("*.jsonl", "base/*", "one/*")),
    "task_class": (task_class, open_recipe, ("one/*",)),
    "written": (written, open_written, (f"{OUTPUT}/*.json", f"{OUTPUT}/*.safetensors", f"{OUTPUT}/heads/*")),
}


def build(folder: Path) -> None:
    """Write all pools."""
    torch.manual_seed(0)
    for name, (write, _, _) in POOLS.items():
        (folder / name).mkdir()
        write(folder / name)


def damaged_files(folder: Path) -> list[tuple[str, str]]:
    """All (pool, file within it) that an input may damage."""
    files = {
        (name, str(file.relative_to(folder / name)))
        for name, (_, _, patterns) in POOLS.items()
        for pattern in patterns
        for file in (folder / name).glob(pattern)
        if file.is_file()
    }
    return sorted(files)
