"""One backbone, many tasks: load a checkpoint that epmq wrote and ask it any of its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq.checkpoint import resolve
from epmq.data import load_processor
from epmq.heads import Head, load_head
from epmq.skeleton import load_model, rename, set_tensor

HEADS = "heads"


class NativeHead(nn.Module):
    """A task head in transformers' own form, such as `BertForSequenceClassification` around a shared backbone."""

    def __init__(
        self, backbone: nn.Module, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        import transformers
        from accelerate import init_empty_weights

        kind = getattr(transformers, architecture)
        settings = transformers.AutoConfig.for_model(**config)
        with init_empty_weights(include_buffers=False):
            model = kind._from_config(settings).eval()
        setattr(model, kind.base_model_prefix, getattr(backbone, kind.base_model_prefix, backbone))
        for name, stored in rename(model, tensors)[0].items():
            set_tensor(model, name, tensors[stored])
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"head of {architecture}: no tensor for {', '.join(missing)}")
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """Logits of the task class."""
        return self.model(**inputs).logits


def save_native_head(path: Path, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the head tensors of a transformers task class, with what is needed to build it again."""
    metadata = {"architecture": architecture, "config": json.dumps(config)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path), metadata=metadata)


class MultiTaskModel(nn.Module):
    """A backbone with the heads of all its tasks.

    Attributes:
        backbone: a transformers model.
        processor: its tokenizer or image processor, or None.
        tasks: names of the tasks.
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, Head | NativeHead], processor: Any = None) -> None:
        super().__init__()
        self.backbone, self.processor, self._heads = backbone, processor, heads

    @property
    def tasks(self) -> list[str]:
        return list(self._heads)

    def head(self, task: str) -> Head | NativeHead:
        """The head of a task.

        Raises:
            KeyError: there is no such task; the ones there are are named.
        """
        if task not in self._heads:
            raise KeyError(f"no task {task!r}; there are: {', '.join(self.tasks) or 'none'}")
        return self._heads[task]

    def forward(self, task: str, **inputs: Any) -> Tensor:
        """Class scores [batch, classes] of one task; `inputs` are the backbone's."""
        head = self.head(task)
        if isinstance(head, NativeHead):
            return head(**inputs)
        return head.logits(self.backbone(**inputs).last_hidden_state, inputs.get("attention_mask"))

    def labels(self, task: str) -> list[str]:
        """Names of a task's classes, in the order of the scores; empty if they were not recorded."""
        head = self.head(task)
        if isinstance(head, Head):
            return head.labels
        names = head.model.config.id2label or {}
        return [names[index] for index in sorted(names)]

    @torch.no_grad()
    def answer(self, task: str, inputs: Any, max_length: int | None = None) -> list[str | int]:
        """The best class of each input (texts, or images as paths or uint8 arrays), by name where names are known."""
        from epmq.data import Examples, encode

        kind = "text" if hasattr(self.processor, "convert_ids_to_tokens") else "image"
        names, found = self.labels(task), []
        for batch in encode(Examples(kind, list(inputs), None), self.processor, 32, max_length):
            found += self(task, **_to(batch, self.device)).argmax(-1).tolist()
        return [names[index] if names else index for index in found]

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device


def load(path: str | Path, device: str | torch.device = "cpu") -> MultiTaskModel:
    """Load a checkpoint written by epmq: the model and the head of every task.

    Args:
        path: directory or Hub id.
        device: where to.

    Raises:
        FileNotFoundError: no such directory, or it holds no model.
    """
    path = resolve(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: no config.json")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    backbone = load_model(path, config).to(device)
    heads = {file.stem: load_any_head(file, backbone) for file in sorted((path / HEADS).glob("*.safetensors"))}
    return MultiTaskModel(backbone, heads, load_processor(path))


def load_any_head(path: Path, backbone: nn.Module) -> Head | NativeHead:
    """A head file of either form; `backbone` is what a native head is put around."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if "architecture" not in metadata:
        return load_head(path)
    device = next(backbone.parameters()).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return NativeHead(backbone, metadata["architecture"], json.loads(metadata["config"]), tensors)


def _to(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
