"""Tiny random models and data that every test may use. They are for unit tests only: no accuracy is read off them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from epmq.models.heads import HEAD_FILE, Head, save_head

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "big", "small"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
TEXTS = ["the cat sat on the mat", "a dog ran", "blue tree"]

settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny_bert(**settings: Any) -> BertModel:
    config = BertConfig(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        **settings,
    )
    return BertModel(config).eval()


def tiny_dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=14
    )
    return Dinov2Model(config).eval()


def padded_batches(count: int = 3, size: int = 4, vocabulary: int = 32) -> list[dict[str, torch.Tensor]]:
    """Batches of token ids of unequal lengths, with padding."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        lengths = torch.randint(2, 9, (size,), generator=generator)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(5, vocabulary, mask.shape, generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def perturbed(model: Any, seed: int, size: float = 0.02) -> Any:
    """A stand-in for a fine-tune: the same model with every weight moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def write_texts(path: Path, count: int, classes: int, seed: int) -> Path:
    """A .jsonl file of random sentences with labels."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(count):
            length = int(torch.randint(2, 8, (1,), generator=generator))
            words = [WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator)]
            label = int(torch.randint(0, classes, (1,), generator=generator))
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `build_pool` makes it; tests that spoil it take a copy."""
    return build_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture
def own_pool(pool: Path, tmp_path: Path) -> Path:
    """A copy of the pool that a test may spoil."""
    return Path(shutil.copytree(pool, tmp_path / "pool"))


def build_pool(folder: Path) -> Path:
    """Write `base`, `experts/{one,two}` (BERT, with heads) and `data/{one,two}.jsonl` into a folder."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = tiny_bert()
    base.save_pretrained(folder / "base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for seed, task in enumerate(("one", "two"), start=1):
        expert = perturbed(BertModel.from_pretrained(folder / "base"), seed)
        expert.save_pretrained(folder / "experts" / task)
        head = Head(torch.randn(3, 64), torch.randn(3), "mean", True, ["x", "y", "z"])
        save_head(head, folder / "experts" / task / HEAD_FILE)
        write_texts(folder / "data" / f"{task}.jsonl", 24, 3, seed)
    return folder


def recipe_for(pool: Path, **fields: Any) -> dict[str, Any]:
    """A recipe over the pool; keyword arguments replace or add top-level fields."""
    experts = [
        {
            "name": task,
            "model": str(pool / "experts" / task),
            "calibration": {"path": str(pool / "data" / f"{task}.jsonl")},
            "evaluation": {"path": str(pool / "data" / f"{task}.jsonl")},
        }
        for task in ("one", "two")
    ]
    return {"base": str(pool / "base"), "experts": experts, "batch_size": 8, "max_length": 16, **fields}


def word_tokenizer(ends: bool = False, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with padding, end and unknown tokens 0, 2 and 3; `ends`: it writes the end itself."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    if ends:
        core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**names, **settings})
