"""Training of an expert, and the pool that keeps it, on a tiny random BERT with a hand-made tokenizer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import load_processor
from epmq.demo import build as pools
from epmq.demo.finetune import TrainingSettings, accuracy, class_mean_head, train_expert, training_order
from epmq.demo.texts import TextTask, write_task
from epmq.models.heads import HEAD_FILE, load_head

WORDS = ["red", "green", "blue", "one", "two", "three", "the", "a"]
LABELS = ["colour", "number"]
SETTINGS = TrainingSettings("mean", 8, epochs=2, learning_rate=3e-3, batch_size=8)


def tiny_base(folder: Path) -> None:
    """A random two-layer BERT and a word-level tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)


def sentences(count: int, seed: int) -> Examples:
    """`the <word> a <word>`: the label tells whether the last word is a colour or a number."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    texts = [f"the {WORDS[rng.integers(6)]} a {WORDS[3 * label + rng.integers(3)]}" for label in labels]
    return Examples("text", texts, labels.astype(np.int64))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_base(tmp_path / "base")
    return tmp_path / "base"


def train(
    base: Path, out: Path, progress: Callable[[float], None] = lambda share: None, **changes: Any
) -> dict[str, Any]:
    splits = {"train": sentences(96, 0), "validation": sentences(24, 1), "test": sentences(40, 2)}
    return train_expert(base, out, splits, LABELS, replace(SETTINGS, **changes), progress)


def test_training_beats_the_base_and_can_be_read_back(base: Path) -> None:
    from transformers import AutoModel

    out = base.with_name("expert")
    shares: list[float] = []
    record = train(base, out, progress=shares.append)
    assert record == json.loads((out / "training.json").read_text())
    assert record["validation"] == max(record["validation_by_epoch"]) > 0.9
    assert record["examples"] == {"train": 96, "validation": 24, "test": 40}
    assert shares == sorted(shares) and shares[-1] == 1.0
    head, processor = load_head(out / HEAD_FILE), load_processor(out)
    model = AutoModel.from_pretrained(out)
    assert accuracy(model, head, processor, sentences(40, 2), 8) == record["test"]
    assert head.labels == LABELS
    assert [path.name for path in base.parent.glob(".*")] == []


def test_the_head_belongs_to_the_base_and_is_not_trained(base: Path) -> None:
    from transformers import AutoModel

    train(base, base.with_name("expert"))
    model, processor = AutoModel.from_pretrained(base), load_processor(base)
    expected = class_mean_head(model, processor, sentences(96, 0), LABELS, SETTINGS)
    written = load_head(base.with_name("expert") / HEAD_FILE)
    torch.testing.assert_close(written.weight, expected.weight)
    torch.testing.assert_close(written.bias, expected.bias)


def test_the_head_scores_by_nearest_class_mean(base: Path) -> None:
    from transformers import AutoModel

    model, processor, examples = (
        AutoModel.from_pretrained(base).eval(),
        load_processor(base),
        sentences(64, 0),
    )
    head = class_mean_head(model, processor, examples, LABELS, SETTINGS)
    with torch.no_grad():
        (batch,) = encode(examples, processor, 64, 8)
        hidden = model(**batch).last_hidden_state
    features = head.features(hidden, batch["attention_mask"])
    assert examples.labels is not None
    means = torch.stack([features[torch.from_numpy(examples.labels) == k].mean(0) for k in range(2)])
    directions = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    expected = 20 * (features - means.mean(0)) @ directions.T
    torch.testing.assert_close(head.logits(hidden, batch["attention_mask"]), expected, atol=1e-4, rtol=1e-4)


def test_batches_hold_every_text_once_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    texts = ["x" * int(length) for length in rng.integers(1, 100, 203)]
    examples = Examples("text", texts, np.arange(203))
    order = training_order(examples, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(203))
    lengths = np.array([len(texts[i]) for i in order])
    spread = [np.ptp(lengths[start : start + 8]) for start in range(0, 200, 8)]
    assert np.mean(spread) < 20
    assert (order != training_order(examples, 8, np.random.default_rng(2))).any()
    tidied = examples.by_length()
    assert tidied.labels is not None and [texts[k] for k in tidied.labels] == tidied.inputs


def test_an_interrupted_training_leaves_nothing_that_looks_whole(base: Path) -> None:
    out = base.with_name("expert")

    def stop(share: float) -> None:
        if share > 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, out, progress=stop)
    assert not out.exists()
    assert train(base, out)["examples"]["train"] == 96


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=r"encoder\.layer\.\d+\..*\.(query|key|value|dense)")


def test_an_adapter_is_written_in_place_of_the_model_and_gives_what_was_measured(base: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel

    out, config = base.with_name("expert"), lora()
    record = train(base, out, adapter=config, learning_rate=3e-2, epochs=4)
    assert record["validation"] == max(record["validation_by_epoch"]) > 0.9
    assert record["settings"]["adapter"] == "LORA"
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    weights = load_file(out / "adapter_model.safetensors")
    # two matrices for each of six layers in two blocks; the pooler's `dense` is not among them
    assert len(weights) == 24 and all(".encoder.layer." in name for name in weights)
    assert any(weights[name].any() for name in weights if "lora_B" in name)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert config.base_model_name_or_path is None  # the caller's configuration serves the next expert too
    head, processor = load_head(out / HEAD_FILE), load_processor(out)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(out))
    assert accuracy(model, head, processor, sentences(40, 2), 8) == record["test"]


def test_an_adapter_has_the_head_of_a_whole_expert(base: Path) -> None:
    train(base, base.with_name("whole"))
    train(base, base.with_name("adapter"), adapter=lora())
    whole, adapter = (load_head(base.with_name(name) / HEAD_FILE) for name in ("whole", "adapter"))
    torch.testing.assert_close(adapter.weight, whole.weight, rtol=0, atol=0)
    torch.testing.assert_close(adapter.bias, whole.bias, rtol=0, atol=0)


def test_a_complete_pool_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = sentences(200, 0)
    assert examples.labels is not None
    texts, labels = examples.inputs, [int(label) for label in examples.labels]
    calls: list[str] = []

    def prepare_base(folder: Path) -> None:
        calls.append("base")
        tiny_base(folder)

    def prepare_task(name: str, folder: Path) -> None:
        calls.append(name)
        write_task(TextTask(texts, labels, LABELS, {}), folder, {"train": 64, "validation": 16, "test": 32})

    def build(tasks: list[str]) -> dict[str, dict[str, Any]]:
        return pools.build_pool(tmp_path, tasks, prepare_base, prepare_task, SETTINGS)

    first = build(["a"])
    assert calls == ["base", "a"]
    both = build(["a", "b"])
    assert calls == ["base", "a", "b"] and both["a"] == first["a"]
    monkeypatch.setattr(pools, "train_expert", None)
    assert build(["a", "b"]) == both
    assert calls == ["base", "a", "b"]
