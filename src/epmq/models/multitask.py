"""One backbone, many tasks: load a checkpoint that epmq wrote and ask it any of its tasks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.data.encoding import encode, fit_to_model, load_processor, to_device, tokenizer_of
from epmq.data.examples import Examples
from epmq.errors import InputError, UnknownTaskError, error_context
from epmq.models.checkpoint import read_config, resolve
from epmq.models.heads import Head, load_head, read_head_file
from epmq.models.loading import load_model
from epmq.models.meta import empty_model, named_class, no_larger, rename, set_tensor

HEADS = "heads"


class NativeHead(nn.Module):
    """A task head in transformers' own form, such as `BertForSequenceClassification` around a shared backbone.

    Attributes:
        model: the task class.
        stored: name of a tensor of the head in that class → its name on disk.
        own: tensors that take the place of the backbone's for the length of a call, such as a pooler.
    """

    def __init__(
        self, backbone: nn.Module, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        import transformers

        task_class = named_class(architecture)
        if task_class is None:
            raise InputError(f"transformers has no class {architecture}")
        parameters = list(backbone.parameters())
        # While a model is being built its blocks are empty, and embeddings keep the dtype on disk.
        sample = next((parameter for parameter in reversed(parameters) if not parameter.is_meta), torch.empty(0))
        entries = 64 * sum(tensor.numel() for tensor in [*parameters, *tensors.values()])
        with error_context(f"the config of {architecture}", "transformers cannot build it"):
            bounds = no_larger("it", len(parameters) + len(tensors), entries)
            self.model: Any = empty_model(task_class, transformers.AutoConfig.for_model(**config), bounds)
        prefix = self.model.base_model_prefix
        setattr(self.model, prefix, getattr(backbone, prefix, backbone))
        self.own: dict[str, Tensor] = {}
        self.stored = rename(self.model, tensors)[0]
        for name, stored in self.stored.items():
            tensor = tensors[stored].to(sample.device, sample.dtype if tensors[stored].is_floating_point() else None)
            if name.startswith(f"{prefix}."):  # such as a pooler: the backbone's is every task's
                self.own[name] = tensor
            else:
                set_tensor(self.model, name, tensor)
        absent = (name for name, parameter in self.model.named_parameters() if parameter.is_meta)
        missing = [name for name in absent if not name.startswith(f"{prefix}.")]
        if missing:
            raise InputError(f"head of {architecture}: no tensor for {', '.join(missing)}")

    @property
    def scoring(self) -> nn.Linear | None:
        """The last linear layer that is the head's own: the one that gives the scores, where one does."""
        heads = self.stored.keys() - self.own.keys()
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return next((layer for name, layer in reversed(layers) if f"{name}.weight" in heads), None)

    def with_weights(self, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The head's tensors as they are on disk, with another weight and bias in the layer that gives the scores."""
        layer = next(name for name, module in self.model.named_modules() if module is self.scoring)
        new = {f"{layer}.weight": weight, f"{layer}.bias": bias}
        changed = {self.stored[name]: tensor for name, tensor in new.items() if tensor is not None}
        return {**tensors, **{name: tensor.to(tensors[name]) for name, tensor in changed.items()}}

    def forward(self, **inputs: Any) -> Tensor:
        """Logits of the task class."""
        logits: Tensor = torch.func.functional_call(self.model, self.own, (), inputs).logits
        return logits


class MultiTaskModel(nn.Module):
    """A backbone (a transformers model) with its tokenizer or image processor, and the heads of all its `tasks`."""

    def __init__(self, backbone: nn.Module, heads: dict[str, Head | NativeHead], processor: Any = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.processor, self._heads, self.tasks = processor, heads, list(heads)
        fit_to_model(processor, backbone.forward)

    def head(self, task: str) -> Head | NativeHead:
        """The head of a task; where there is no such task, the KeyError names those there are."""
        if task not in self._heads:
            raise UnknownTaskError(f"no task {task!r}; there are: {', '.join(self.tasks) or 'none'}")
        return self._heads[task]

    def forward(self, task: str, **inputs: Any) -> Tensor:
        """Class scores [batch, classes] of one task; `inputs` are the backbone's."""
        head = self.head(task)
        if isinstance(head, Head):
            return head.scores(head.read(self.backbone(**inputs), inputs.get("attention_mask")))
        logits: Tensor = head(**inputs)
        return logits

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
        kind = "image" if self.backbone.main_input_name == "pixel_values" else "text"
        names, classes = self.labels(task), list[int]()
        for batch in encode(Examples(kind, list(inputs)), self.processor, 32, max_length):
            classes += self(task, **to_device(batch, self.device)).argmax(-1).tolist()
        return [names[index] if names else index for index in classes]

    @torch.no_grad()
    def generate(self, texts: list[str], max_new_tokens: int = 64, **settings: Any) -> list[str]:
        """What a language model writes to each text: the continuation, or an encoder–decoder's answer.

        `settings` go to transformers' `generate`, greedy by default. A model that generates no text is a ValueError.
        """
        tokenizer = tokenizer_of(self.processor)
        if tokenizer is None or not getattr(self.backbone, "can_generate", lambda: False)():
            raise InputError(f"{type(self.backbone).__name__} does not generate text")
        written = []
        for text in texts:
            batch = to_device(dict(tokenizer(text, return_tensors="pt")), self.device)
            batch.pop("token_type_ids", None)
            tokens = self.backbone.generate(
                **batch, **{"max_new_tokens": max_new_tokens, "do_sample": False, **settings}
            )
            start = 0 if self.backbone.config.is_encoder_decoder else batch["input_ids"].shape[1]
            written.append(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
        return written

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.backbone.parameters()).device)


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> MultiTaskModel:
    """Load a checkpoint written by epmq, a directory or Hub id: the model and the head of every task.

    `dtype` is what is computed in: by default float32 on a CPU and the stored dtype elsewhere.

    Raises:
        FileNotFoundError: no such directory, or it holds no model.
    """
    path = resolve(path)
    config = read_config(path / "config.json")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    backbone = load_model(path, config, dtype=dtype).to(device)
    heads = {file.stem: load_any_head(file, backbone) for file in sorted((path / HEADS).glob("*.safetensors"))}
    return MultiTaskModel(backbone, heads, load_processor(path))


def load_any_head(path: Path, backbone: nn.Module) -> Head | NativeHead:
    """A head file of either form; `backbone` is what a native head is put around."""
    tensors, settings = read_head_file(path)
    if "architecture" not in settings:
        return load_head(path)
    architecture, config = settings["architecture"], settings.get("config")
    if not isinstance(architecture, str) or not isinstance(config, dict):
        raise InputError(f"{path}: the settings in its metadata must name an architecture and its config")
    with error_context(path, "the head cannot be built"):
        return NativeHead(backbone, architecture, config, tensors)
