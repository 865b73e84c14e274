"""Make an expert: fine-tune a backbone under a fixed class-mean head.

The head plays the part of CLIP's zero-shot head: it is computed once from the base model's own features and then
kept, so that the backbone alone is fine-tuned, merged and quantized.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.models.multitask import MultiTaskModel
from epmq.pipeline import evaluation as evaluate


def hidden_states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden state of a backbone, [batch, tokens, features]."""
    return model(**batch).last_hidden_state


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
def class_mean_head(
    model: Any,
    processor: Any,
    train: Examples,
    labels: list[str],
    pooling: str,
    max_length: int | None,
    scale: float,
) -> Head:
    """A nearest-class-mean head in linear form.

    With unit features f, their mean μ and class means m_c, `logits_c = scale · (f − μ)·(m_c − μ)/|m_c − μ|`.

    Args:
        model: the base backbone.
        processor: its tokenizer or image processor.
        train: labelled examples.
        labels: the names of the classes.
        pooling: see `epmq.models.heads.pool`.
        max_length: tokens a text is cut to.
        scale: inverse temperature of the cosine scores.
    """
    blank = Head(torch.zeros(1, 1), torch.zeros(1), pooling)
    model.eval()
    train = train.by_length()
    rows = [
        blank.features(hidden_states(model, batch), batch.get("attention_mask"))
        for batch in encode(train, processor, 64, max_length)
    ]
    features = torch.cat(rows)
    assert train.labels is not None
    target = torch.from_numpy(train.labels)
    means = torch.stack([features[target == k].mean(0) for k in range(len(labels))])
    centre = means.mean(0)
    weight = scale * torch.nn.functional.normalize(means - centre, dim=-1)
    return Head(weight, -weight @ centre, pooling, True, labels)


def accuracy(model: Any, head: Head, processor: Any, examples: Examples, max_length: int | None) -> float:
    """Share of examples whose highest score is the label."""
    task = MultiTaskModel(model.eval(), {"task": head}, processor)
    return evaluate.accuracy(task, "task", examples, 64, max_length)


def train_expert(
    base: str | Path,
    out: str | Path,
    train: Examples,
    validation: Examples,
    test: Examples,
    labels: list[str],
    *,
    pooling: str,
    max_length: int | None = None,
    epochs: int = 3,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    scale: float = 20.0,
    seed: int = 0,
    adapter: Any | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Fine-tune `base` on one task and write the expert to `out` (a Hugging Face or PEFT directory and its head).

    An expert that is already there is kept; `out` appears by rename when it is whole. The epoch with the best
    validation accuracy is the one written.

    Args:
        base: directory of the base backbone.
        out: where the expert goes; `training.json` in it records settings, accuracies and seconds.
        train, validation, test: labelled splits.
        labels: names of the classes.
        pooling: how the head pools (see `epmq.models.heads.pool`).
        max_length: tokens a text is cut to.
        epochs, learning_rate, batch_size, scale, seed: of the training (AdamW, linear warm-up and decay).
        adapter: a `peft` configuration, such as a `LoraConfig`: only the adapter is trained, and written in place
            of the model; None trains every weight.
        progress: called with the share done, 0 to 1.

    Returns:
        the content of `training.json`: accuracies of the base and of the expert among it.
    """
    from transformers import AutoModel

    from epmq.data.encoding import load_processor

    out = Path(out)
    if (out / "training.json").exists():
        return json.loads((out / "training.json").read_text())
    start = time.time()
    torch.manual_seed(seed)
    processor, model = load_processor(base), AutoModel.from_pretrained(base, dtype=torch.float32)
    head = class_mean_head(model, processor, train, labels, pooling, max_length, scale)
    record: dict[str, Any] = {
        "base_validation": accuracy(model, head, processor, validation, max_length),
        "base_test": accuracy(model, head, processor, test, max_length),
    }
    if adapter is not None:
        from peft import get_peft_model

        # a copy, for peft notes the path of the base in it; the head is made by now, of the bare base's features
        model = get_peft_model(model, copy.deepcopy(adapter))
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), (steps - step) / max(1, steps))
    )
    rng, best, history, step = np.random.default_rng(seed), -1.0, [], 0
    for _ in range(epochs):
        model.train()
        shuffled = train.take(training_order(train, batch_size, rng))
        assert shuffled.labels is not None
        target = torch.from_numpy(shuffled.labels)
        for i, batch in enumerate(encode(shuffled, processor, batch_size, max_length)):
            logits = head.logits(hidden_states(model, batch), batch.get("attention_mask"))
            loss = torch.nn.functional.cross_entropy(logits, target[i * batch_size : (i + 1) * batch_size])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            progress(step / steps)
        history.append(accuracy(model, head, processor, validation, max_length))
        if history[-1] > best:
            best = history[-1]
            model.save_pretrained(work)
    processor.save_pretrained(work)
    save_head(head, work / HEAD_FILE)
    # read back from disk: the best epoch need not be the last, and what is measured is what was written
    model = AutoModel.from_pretrained(work if adapter is None else base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(work))
    record |= {
        "validation": best,
        "test": accuracy(model, head, processor, test, max_length),
        "validation_by_epoch": history,
        "examples": {"train": len(train), "validation": len(validation), "test": len(test)},
        "settings": {
            "pooling": pooling,
            "max_length": max_length,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "scale": scale,
            "seed": seed,
            "adapter": None if adapter is None else str(adapter.peft_type.value),
        },
        "seconds": round(time.time() - start, 1),
    }
    (work / "training.json").write_text(json.dumps(record, indent=2))
    out.parent.mkdir(parents=True, exist_ok=True)
    work.rename(out)
    return record
