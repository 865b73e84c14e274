"""Make an expert: fine-tune a backbone under a fixed class-mean head.

The head plays the part of CLIP's zero-shot head: it is computed once from the base model's own features and then
kept, so that the backbone alone is fine-tuned, merged and quantized.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.data.processors import load_processor
from epmq.files import whole_directory
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.models.multitask import MultiTaskModel
from epmq.pipeline import metrics

# File in an expert's folder that tells how it was made, and how well it does.
RECORD = "training.json"
SPLITS = ("train", "validation", "test")
# Examples in a forward where nothing is trained.
BATCH_SIZE = 64
# Called with the share done, 0 to 1.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How an expert is trained: AdamW with linear warm-up and decay.

    Attributes:
        pooling: how the head pools (see `epmq.models.heads.pool`).
        max_length: tokens a text is cut to.
        epochs, learning_rate, batch_size: of the training.
        scale: inverse temperature of the head's cosine scores.
        seed: of the order of the examples and of what the model draws.
        adapter: a `peft` configuration, such as a `LoraConfig`: only the adapter is trained, and written in place
            of the model; None trains every weight.
    """

    pooling: str
    max_length: int | None = None
    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    scale: float = 20.0
    seed: int = 0
    adapter: Any | None = None

    def record(self) -> dict[str, Any]:
        """The settings as plain values; of an adapter its kind alone, such as `LORA`."""
        return vars(self) | {"adapter": None if self.adapter is None else str(self.adapter.peft_type.value)}


def train_expert(
    base: Path,
    out: Path,
    splits: Mapping[str, Examples],
    labels: list[str],
    settings: TrainingSettings,
    progress: Progress = lambda share: None,
) -> dict[str, Any]:
    """Fine-tune `base` on one task and write the expert to `out` (a Hugging Face or PEFT directory and its head).

    `out` appears by rename when it is whole. The epoch with the best validation accuracy is the one written.

    Args:
        base: directory of the base backbone.
        out: where the expert goes; `training.json` in it records settings, accuracies and seconds.
        splits: labelled examples: `train`, `validation` and `test`.
        labels: names of the classes.
        settings, progress: of head and training.

    Returns:
        the content of `training.json`: accuracies of the base and of the expert among it.
    """
    start = time.time()
    torch.manual_seed(settings.seed)
    train, validation, test = (splits[name] for name in SPLITS)
    length, processor, model = settings.max_length, load_processor(base), _load_backbone(base)
    head = class_mean_head(model, processor, train, labels, settings)
    before = {f"base_{name}": accuracy(model, head, processor, splits[name], length) for name in SPLITS[1:]}
    with whole_directory(out) as work:
        history: list[float] = []
        for trained in _epochs(model, head, processor, train, settings, progress):
            history.append(accuracy(trained, head, processor, validation, length))
            if history[-1] > max(history[:-1], default=-1.0):
                trained.save_pretrained(work)
        processor.save_pretrained(work)
        save_head(head, work / HEAD_FILE)
        # read back from disk: the best epoch need not be the last, and what is measured is what was written
        written = _load_backbone(work) if settings.adapter is None else _load_backbone(base, adapter=work)
        record = before | {
            "validation": max(history),
            "test": accuracy(written, head, processor, test, length),
            "validation_by_epoch": history,
            "examples": {name: len(splits[name]) for name in SPLITS},
            "settings": settings.record(),
            "seconds": round(time.time() - start, 1),
        }
        (work / RECORD).write_text(json.dumps(record, indent=2))
    return record


def _load_backbone(folder: Path, adapter: Path | None = None) -> Any:
    """The model in a folder, in float32, with the adapter of another folder if there is one."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model


def _epochs(
    model: Any, head: Head, processor: Any, train: Examples, settings: TrainingSettings, progress: Progress
) -> Iterator[Any]:
    """Train a model, which gets an adapter if the settings have one; yields it after each epoch."""
    if settings.adapter is not None:
        from peft import get_peft_model

        # a copy, for peft notes the path of the base in it
        model = get_peft_model(model, copy.deepcopy(settings.adapter))
    size, rng = settings.batch_size, np.random.default_rng(settings.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = settings.epochs * -(-len(train) // size)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / max(1, steps))
    )
    for _ in range(settings.epochs):
        model.train()
        shuffled = train.take(training_order(train, size, rng))
        targets = torch.split(_targets(shuffled), size)
        for batch, target in zip(encode(shuffled, processor, size, settings.max_length), targets):
            logits = head.logits(model(**batch).last_hidden_state, batch.get("attention_mask"))
            optimizer.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, target))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress(schedule.last_epoch / steps)
        yield model


def training_order(examples: Examples, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order whose batches hold texts of like length, which halves the padding: [n] positions.

    Sixteen batches of a random order are sorted by length at a time; then whole batches are shuffled, the last
    one (which may be short) excepted.
    """
    order = rng.permutation(len(examples))
    if examples.kind != "text":
        return order
    window = 16 * batch_size
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort([len(examples.inputs[i]) for i in part], kind="stable")]
    full = len(order) // batch_size
    batches = order[: full * batch_size].reshape(full, batch_size)
    return np.concatenate([rng.permutation(batches).ravel(), order[full * batch_size :]])


@torch.no_grad()
def class_mean_head(model: Any, processor: Any, train: Examples, labels: list[str], settings: TrainingSettings) -> Head:
    """A nearest-class-mean head in linear form.

    With unit features f, their mean μ and class means m_c, `logits_c = scale · (f − μ)·(m_c − μ)/|m_c − μ|`.
    `train` are labelled examples, and `labels` the names of their classes.
    """
    blank = Head(torch.zeros(1, 1), torch.zeros(1), settings.pooling)
    model.eval()
    train = train.by_length()
    batches = encode(train, processor, BATCH_SIZE, settings.max_length)
    features = torch.cat(
        [blank.features(model(**batch).last_hidden_state, batch.get("attention_mask")) for batch in batches]
    )
    targets = _targets(train)
    means = torch.stack([features[targets == k].mean(0) for k in range(len(labels))])
    centre = means.mean(0)
    weight = settings.scale * torch.nn.functional.normalize(means - centre, dim=-1)
    return Head(weight, -weight @ centre, settings.pooling, True, labels)


def accuracy(model: Any, head: Head, processor: Any, examples: Examples, max_length: int | None) -> float:
    """Share of examples whose highest score is the label."""
    task = MultiTaskModel(model.eval(), {"task": head}, processor)
    return metrics.accuracy(task, "task", examples, batch_size=BATCH_SIZE, max_length=max_length)


def _targets(examples: Examples) -> torch.Tensor:
    """Class indices of labelled examples: int64, [n]."""
    assert examples.labels is not None
    return torch.from_numpy(examples.labels)
