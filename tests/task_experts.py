"""Tiny experts of one base with heads of every kind, and rows that they are scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import WORDS, perturbed, tiny_bert, word_tokenizer
from tokenizers.processors import TemplateProcessing

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
# Kind → task class and its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class": ("SequenceClassification", {"id2label": {0: "NEG", 1: "MID", 2: "POS"}}),
    "number": ("SequenceClassification", {"num_labels": 1}),
    "labels": ("SequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "tags": ("TokenClassification", {"id2label": dict(enumerate(TAGS))}),
    "span": ("QuestionAnswering", {}),
    "choice": ("MultipleChoice", {}),
    "masked": ("MaskedLM", {}),
}


def sentence(generator: torch.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (words,), generator=generator))


def rows(kind: str, count: int = 12) -> list[dict[str, Any]]:
    """Labelled rows for a head of some kind."""
    generator, found = torch.Generator().manual_seed(len(kind)), []
    for number in range(count):
        text = sentence(generator, 3 + number % 5)
        labels = {"class": number % 3, "number": number / 7, "labels": [number % 2, number // 2 % 2, 1]}
        row: dict[str, Any] = {"text": text, "label": labels.get(kind, 0)}
        if kind == "span":
            words = text.split()
            answers = {"text": [" ".join(words[1:3]), words[0]], "answer_start": [0, 0]}
            row = {"question": sentence(generator, 2), "context": text, "answers": answers}
        elif kind == "tags":
            words = text.split()
            row = {"tokens": words, "tags": [(number + i) % len(TAGS) for i in range(len(words))]}
        elif kind == "choice":
            row = {
                "text": text,
                "choices": [sentence(generator, 2) for _ in range(2 + number % 2)],
                "label": number % 2,
            }
        found.append(row)
    return found


def tokenizer() -> Any:
    """A tokenizer of whole words that puts a token in front and one at the end, as BERT's does."""
    found = word_tokenizer(cls_token="<s>", sep_token="</s>")
    special = [("<s>", 1), ("</s>", 2)]
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=special
    )
    return found


def fine_tuned(model: Any, seed: int) -> Any:
    """A stand-in for a fine-tune whose head tells texts apart."""
    perturbed(model, seed, 0.01)
    generator, prefix = torch.Generator().manual_seed(seed), model.base_model_prefix + "."
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith((prefix, "shared.", "encoder.", "decoder.")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def build(folder: Path) -> dict[str, str]:
    """Write `base` and an expert of every kind into a folder; kind → its directory."""
    tiny_bert().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for seed, (kind, (head, settings)) in enumerate(KINDS.items(), start=1):
        config = transformers.BertConfig.from_pretrained(folder / "base")
        for name, value in settings.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        task_class = getattr(transformers, f"BertFor{head}")
        model = task_class.from_pretrained(folder / "base", config=config).eval()
        fine_tuned(model, seed).save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in KINDS}


def recipe_of(folder: Path, *kinds: str, **fields: Any) -> dict[str, Any]:
    """A recipe of some of the experts, without data."""
    experts = [{"name": kind, "model": str(folder / kind)} for kind in kinds]
    return {"base": str(folder / "base"), "experts": experts, "batch_size": 5, "quantize": {"method": "none"}, **fields}
