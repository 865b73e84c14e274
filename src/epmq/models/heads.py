"""Task heads that sit on a shared backbone: pool the last hidden state, normalise it, apply one linear map.

This is the form of a class-mean head and of a linear probe; with the backbone's own pooled output and a projection
before the norm it is that of CLIP's zero-shot head. A head is one small safetensors file beside the expert's weights
(`head.safetensors`); it is never merged and never quantized.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from epmq.errors import InputError, error_context, reason
from epmq.models.tasks import Task

HEAD_FILE = "head.safetensors"
POOLINGS = ("cls", "mean", "cls_mean")
# … or the pooled output that a backbone gives itself, such as CLIP's.
POOLER = "pooler"


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One feature row a sample: [batch, features], or [batch, 2·features] for `cls_mean`.

    Args:
        hidden: last hidden state, [batch, tokens, features], or maps [batch, features, height, width], whose places are
            taken as tokens, row by row.
        mask: 1 for a real token and 0 for padding, [batch, tokens]; None means that all are real.
        pooling: `cls` takes the first token, `mean` averages the real tokens, `cls_mean` puts the first
            token beside the mean of the others (as `Dinov2ForImageClassification` does).
    """
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).mT
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "cls_mean":
        return torch.cat([hidden[:, 0], pool(hidden[:, 1:], mask[:, 1:], "mean")], dim=-1)
    if pooling != "mean":
        raise InputError(f"pooling: {pooling!r} is not one of {', '.join(POOLINGS)}")
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Head:
    """A linear task head: `logits = normalise(pool(hidden)) @ weight.T + bias`.

    Attributes:
        weight: [classes, features], float32.
        bias: [classes], float32.
        pooling: one of `POOLINGS`, or `pooler`, the pooled output that the backbone gives itself.
        normalize: divide the pooled features by their Euclidean norm first.
        labels: names of the classes, in the order of the rows of `weight`; may be empty.
        projection: [features, pooled] float32, applied to the pooled features before they are normalised; or None.
    """

    weight: Tensor
    bias: Tensor
    pooling: str = "cls"
    normalize: bool = True
    labels: list[str] = field(default_factory=list)
    projection: Tensor | None = None

    @property
    def task(self) -> Task:
        """What it answers: a class, or a number where it has but one row."""
        rows = len(self.weight)
        return Task("class" if rows > 1 else "number", "a head of its own", tuple(self.labels), rows)

    def read(self, outputs: Any, mask: Tensor | None) -> Tensor:
        """Features, as `features` gives them, from a backbone's outputs: `pooler` takes its pooled output."""
        return self.project(self.pooled(outputs, mask))

    def pooled(self, outputs: Any, mask: Tensor | None) -> Tensor:
        """What is pooled of a backbone's outputs, [batch, hidden]; heads with the same `pooling` have the same."""
        if self.pooling == POOLER:
            pooled: Tensor = outputs.pooler_output
            return pooled
        return pool(outputs.last_hidden_state, mask, self.pooling)

    def features(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Pooled (and normalised) features in float32, [batch, features]; arguments as in `pool`."""
        return self.project(pool(hidden, mask, self.pooling))

    def project(self, pooled: Tensor) -> Tensor:
        """Features in float32 of what was pooled: projected and normalised, as the head asks for."""
        rows = pooled.float()
        if self.projection is not None:
            rows = rows @ self.projection.to(rows.device).T
        return torch.nn.functional.normalize(rows, dim=-1) if self.normalize else rows

    def logits(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Class scores, [batch, classes] float32; arguments as in `pool`."""
        return self.scores(self.features(hidden, mask))

    def scores(self, features: Tensor) -> Tensor:
        """Class scores of features, [batch, classes] float32."""
        return features @ self.weight.to(features.device).T + self.bias.to(features.device)


def save_head(head: Head, path: str | Path) -> None:
    """Write a head as one safetensors file; its settings go into the file's metadata."""
    settings = {"pooling": head.pooling, "normalize": head.normalize, "labels": head.labels}
    tensors = {"weight": head.weight, "bias": head.bias, "projection": head.projection}
    write_head_file(path, {name: tensor.float() for name, tensor in tensors.items() if tensor is not None}, settings)


def write_head_file(path: str | Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write tensors and settings of a head of either form; where that fails, the OSError names the file."""
    # One entry: safetensors writes several in an order that changes from run to run.
    metadata = {"head": json.dumps(settings)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None


def read_head_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a head file of either form; settings may also be metadata one by one.

    A file that cannot be read, or whose settings are not JSON, is named in a ValueError.
    """
    with error_context(path, "not a readable safetensors file"), safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: tensor {name!r} has NaN or Inf entries")
    keys = ("head",) if "head" in metadata else ("normalize", "labels")
    try:
        parsed = {key: json.loads(metadata[key]) for key in keys if key in metadata}
        settings = parsed.get("head", {**metadata, **parsed})
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the settings in its metadata are not JSON ({reason(error)})") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: the settings in its metadata must be a JSON object")
    return tensors, settings


def load_head(path: str | Path) -> Head:
    """Read a head written by `save_head`; a ValueError says which tensor or setting is not what it should be."""
    tensors, settings = read_head_file(path)
    missing = {"weight", "bias"} - tensors.keys()
    if missing:
        raise InputError(f"{path}: a head file holds 'weight' and 'bias'; missing: {sorted(missing)}")
    weight, bias = tensors["weight"].float(), tensors["bias"].float()
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(
            f"{path}: weight {list(weight.shape)} and bias {list(bias.shape)} must be [classes, features] and [classes]"
        )
    projection = tensors["projection"].float() if "projection" in tensors else None
    if projection is not None and (projection.ndim != 2 or len(projection) != weight.shape[1]):
        raise InputError(f"{path}: projection {list(projection.shape)} must be [{weight.shape[1]}, pooled features]")
    pooling = settings.get("pooling", "cls")
    if pooling not in (*POOLINGS, POOLER):
        raise InputError(f"{path}: pooling {pooling!r} is not one of {', '.join((*POOLINGS, POOLER))}")
    normalize, labels = settings.get("normalize", True), settings.get("labels", [])
    if not isinstance(normalize, bool):
        raise InputError(f"{path}: normalize must be true or false, found {normalize!r:.100}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(f"{path}: labels must be a list of names, found {labels!r:.100}")
    if labels and len(labels) != len(weight):
        raise InputError(f"{path}: {len(labels)} labels for {len(weight)} classes")
    return Head(weight, bias, pooling, normalize, labels, projection)
