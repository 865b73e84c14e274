"""One backbone, many tasks: load a checkpoint that epmq wrote and ask it any of its tasks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epmq.data.encoding import encode, to_device
from epmq.data.examples import Examples
from epmq.data.processors import fit_to_model, load_processor, tokenizer_of
from epmq.errors import InputError, UnknownTaskError, error_context
from epmq.models import predictions
from epmq.models.checkpoint import read_config, resolve
from epmq.models.heads import Head, load_head, read_head_file
from epmq.models.loading import load_model
from epmq.models.meta import empty_model, named_class, no_larger, rename, set_tensor
from epmq.models.replay import replaying
from epmq.models.tasks import input_names, task_of_class

HEADS = "heads"
# What a head answers of a text or a picture as a whole.
WHOLE = ("class", "number", "labels")
# Inputs that `answer` takes at once.
BATCH = 32
# How weights may be kept in memory.
WEIGHTS = ("plain", "packed", "packed-exact")


class NativeHead(nn.Module):
    """A task head in transformers' own form, such as `BertForSequenceClassification` around a shared backbone.

    Attributes:
        model: the task class.
        task: what it answers.
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
        held = [*parameters, *backbone.buffers(), *tensors.values()]  # codes of packed weights are buffers
        entries = 64 * sum(tensor.numel() for tensor in held)
        with error_context(f"the config of {architecture}", "transformers cannot build it"):
            bounds = no_larger("it", len(held), entries)
            self.model: Any = empty_model(task_class, transformers.AutoConfig.for_model(**config), bounds)
        self.task = task_of_class(architecture, self.model.config)
        self._takes = _inputs_of(self.model)
        shared = tuple(f"{part}." for part in put_around(self.model, backbone))
        self.own: dict[str, Tensor] = {}
        self.stored = rename(self.model, tensors)[0]
        for name, stored in self.stored.items():
            tensor = tensors[stored].to(sample.device, sample.dtype if tensors[stored].is_floating_point() else None)
            if name.startswith(shared):  # such as a pooler: the backbone's is every task's
                self.own[name] = tensor
            else:
                set_tensor(self.model, name, tensor)
        absent = (name for name, parameter in self.model.named_parameters() if parameter.is_meta)
        missing = [name for name in absent if not name.startswith(shared)]
        if missing:
            raise InputError(f"head of {architecture}: no tensor for {', '.join(missing)}")
        if self.task.kind == "span" and self.scoring is not None and self.scoring.out_features != 2:
            found = self.scoring.out_features
            raise InputError(f"head of {architecture}: a token has {found} scores, not one to begin and one to end at")

    @property
    def changed(self) -> set[nn.Module]:
        """The modules of the backbone in which it has a tensor of its own, and all that they lie in."""
        paths = [name.split(".") for name in self.own]
        names = {".".join(path[:end]) for path in paths for end in range(1, len(path))}
        return {self.model.get_submodule(name) for name in names}

    @property
    def scoring(self) -> nn.Linear | None:
        """The last linear layer that is the head's own: the one that gives the scores, where one does."""
        heads = self.stored.keys() - self.own.keys()
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return next((layer for name, layer in reversed(layers) if f"{name}.weight" in heads), None)

    def scoring_names(self) -> dict[str, str]:
        """Weight and bias of the layer that gives the scores, where they are the head's → their names on disk."""
        layers = [name for name, module in self.model.named_modules() if module is self.scoring]
        leaves = [(leaf, f"{name}.{leaf}") for name in layers[:1] for leaf in ("weight", "bias")]
        return {leaf: self.stored[name] for leaf, name in leaves if name in self.stored}

    def with_weights(self, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The head's tensors as they are on disk, with another weight and bias in the layer that gives the scores."""
        layer = next(name for name, module in self.model.named_modules() if module is self.scoring)
        new = {f"{layer}.weight": weight, f"{layer}.bias": bias}
        changed = {self.stored[name]: tensor for name, tensor in new.items() if tensor is not None}
        return {**tensors, **{name: tensor.to(tensors[name]) for name, tensor in changed.items()}}

    def forward(self, **inputs: Any) -> Tensor:
        """What the task class says.

        Returns:
            its logits, such as [batch, classes], or [batch, tokens, classes] of a token classifier; of a question
            answerer the scores of each token as the first and as the last one, [batch, tokens, 2]; of classes with
            other outputs the first of them.
        """
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        if self.task.kind == "choice":  # a text that stands alone is the one choice of its example
            inputs = {name: one[:, None] if one.ndim == 2 else one for name, one in inputs.items()}
        with padding_told(self.model.config, inputs):
            outputs = torch.func.functional_call(self.model, self.own, (), inputs)
        return main_output(outputs, self.task.title)


def put_around(model: Any, backbone: nn.Module) -> list[str]:
    """Put a backbone into a task class; the names of the parts of the class that are the backbone's now.

    That is its base model, or the parts that both have: an encoder–decoder may be the base of a class with the encoder
    alone, or have no base model at all.
    """
    prefix = model.base_model_prefix
    inner, shared = getattr(model, prefix, model), getattr(backbone, prefix, backbone)
    named = dict(backbone.named_children())
    alike = [name for name, part in inner.named_children() if isinstance(named.get(name), type(part))]
    whole = inner is not model and (shared is not backbone or type(shared) is type(inner))
    if whole or not alike or not (inner is model or len(alike) == len(list(inner.children()))):
        setattr(model, prefix, shared)
        return [prefix]
    for name in alike:
        setattr(inner, name, named[name])
    return alike if inner is model else [f"{prefix}.{name}" for name in alike]


def _inputs_of(model: Any) -> set[str]:
    """The inputs that a task class takes, of its own or for its base model."""
    named, others = input_names(model)
    inner = getattr(model, model.base_model_prefix, None)
    return named | (input_names(inner)[0] if others and inner is not None else set())


@contextmanager
def padding_told(config: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a class that scores the last token that is no padding know, in a `with` block, which token is.

    Decoders often come without a padding token, or with another one than their tokenizer pads with.
    """
    config = config.get_text_config()
    ids, mask, own = inputs.get("input_ids"), inputs.get("attention_mask"), getattr(config, "pad_token_id", None)
    padding = [] if ids is None or mask is None or mask.shape != ids.shape else ids[mask == 0].tolist()[:1]
    if padding or own is None:
        config.pad_token_id = padding[0] if padding else -1
    try:
        yield
    finally:
        config.pad_token_id = own


def main_output(outputs: Any, title: str) -> Tensor:
    """What a task class says, as a tensor; an InputError names a class that gives none."""
    start, end = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
    if start is not None and end is not None:
        return torch.stack([start, end], dim=-1)
    values = [getattr(outputs, "logits", None), *(outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs)]
    found = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if found is None:
        raise InputError(f"{title} gives no tensor of scores")
    return found


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

    def all_scores(self, **inputs: Any) -> dict[str, Tensor]:
        """What `forward` gives for every task, task by task, from one run of the backbone."""
        scores, pooled = dict[str, Tensor](), dict[str, Tensor]()
        with replaying(self.backbone) as replay:
            for task, head in self._heads.items():
                with replay.head(head.changed if isinstance(head, NativeHead) else set()):
                    if not isinstance(head, Head):
                        scores[task] = self(task, **inputs)
                        continue
                    if head.pooling not in pooled:
                        pooled[head.pooling] = head.pooled(self.backbone(**inputs), inputs.get("attention_mask"))
                    scores[task] = head.scores(head.project(pooled[head.pooling]))
        return scores

    def labels(self, task: str) -> list[str]:
        """Names of a task's classes, in the order of the scores; empty if there are none or they were not recorded."""
        return list(self.head(task).task.names)

    @torch.no_grad()
    def answer(self, task: str, inputs: Any, max_length: int | None = None) -> list[Any]:
        """The task's answer to each input; classes by name where names are known, otherwise by number.

        Args:
            inputs: texts, pairs of texts, or images as paths or uint8 arrays; of a question answerer, pairs of question
                and context; of a token classifier, texts or lists of words; of multiple choice, pairs of a text and a
                list of choices.
            max_length: tokens a text is cut to, or that its windows have where the answer is a part of it.

        Returns:
            the best class; a number, or a list of them, of a regression; a list of classes where several may be right;
            a part of the context; a list of pairs of word and class; the best choice.

        Raises:
            ValueError: the head is none of these, or the tokenizer cannot take the inputs.
        """
        head, inputs = self.head(task).task, list(inputs)
        if head.kind is None or self.backbone.main_input_name not in ("input_ids", "pixel_values"):
            raise InputError(f"{head.title} has no answers: call model({task!r}, …) with inputs of the model")
        named = partial(_named, self.labels(task))
        with error_context(f"task {task}"):
            if head.kind == "span":
                return predictions.spans(self, task, inputs, max_length=max_length)
            if head.kind == "tags":
                found = predictions.tags(self, task, inputs, max_length=max_length)
                return [[(word, None if one is None else named(one)) for word, one in text] for text in found]
            kind = "image" if self.backbone.main_input_name == "pixel_values" else "text"
            examples = Examples("choices" if head.kind == "choice" else kind, inputs)
            scores = [
                row
                for batch in encode(examples, self.processor, BATCH, max_length)
                for row in self(task, **to_device(batch, self.device)).float().cpu()
            ]
            if head.kind == "choice":
                return [inputs[i][1][best] for i, best in enumerate(best_choices(scores, inputs))]
            return [_answer(head.kind, row, named) for row in scores]

    @torch.no_grad()
    def scores(self, inputs: Any, max_length: int | None = None) -> dict[str, Tensor]:
        """The scores of each input in all tasks that answer a whole text or picture, from one run of the backbone.

        Args:
            inputs, max_length: as for `answer`.

        Returns:
            task → scores [inputs, classes] float32, in the order of `labels`; of a regression the numbers.

        Raises:
            ValueError: no task answers a whole text or picture.
        """
        asked = [task for task in self.tasks if self.head(task).task.kind in WHOLE]
        if not asked or self.backbone.main_input_name not in ("input_ids", "pixel_values"):
            raise InputError("no task of this model answers a whole text or picture: use answer or generate")
        part = MultiTaskModel(self.backbone, {task: self._heads[task] for task in asked}, self.processor)
        kind = "image" if self.backbone.main_input_name == "pixel_values" else "text"
        batches = encode(Examples(kind, list(inputs)), self.processor, BATCH, max_length)
        found = [part.all_scores(**to_device(batch, self.device)) for batch in batches]
        return {task: torch.cat([scores[task].float().cpu() for scores in found]) for task in asked}

    def answer_all(self, inputs: Any, max_length: int | None = None) -> dict[str, list[Any]]:
        """What `answer` gives for every task that answers a whole text or picture, from one run of the backbone."""
        answers = {}
        for task, scores in self.scores(inputs, max_length).items():
            kind, named = self.head(task).task.kind, partial(_named, self.labels(task))
            answers[task] = [_answer(str(kind), row, named) for row in scores]
        return answers

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


def _named(names: list[str], index: int) -> str | int:
    return names[index] if names else index


def _answer(kind: str, scores: Tensor, named: Callable[[int], str | int]) -> Any:
    """The answer that the scores of one example give."""
    if kind == "number":
        return float(scores) if scores.numel() == 1 else scores.tolist()
    if kind == "labels":
        return [named(index) for index in (scores > 0).nonzero().flatten().tolist()]
    return named(int(scores.argmax(-1)))


def best_choices(scores: Iterable[Tensor], inputs: Sequence[Any]) -> list[int]:
    """The best choice of each example, from the scores of all choices one after the other."""
    left = iter(scores)
    return [int(torch.cat([next(left).flatten() for _ in choices]).argmax()) for _, choices in inputs]


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    weights: Literal["plain", "packed", "packed-exact"] = "plain",
) -> MultiTaskModel:
    """Load a checkpoint written by epmq, a directory or Hub id: the model and the head of every task.

    Args:
        path: of the checkpoint.
        device: where the model is to be.
        dtype: what is computed in: by default float32 on a CPU and the stored dtype elsewhere.
        weights: how they are kept in memory. `plain`: made of their codes once. `packed`: as codes; kernels of PyTorch
            multiply few rows by them, such as a token that is generated, in bfloat16 (each product is off by about 0.3
            percent), and for many rows, or where a layer has no kernel, its weight is made for the call.
            `packed-exact`: as codes, without kernels: outputs are those of `plain`.

    Raises:
        FileNotFoundError: no such directory, or it holds no model.
        ValueError: `weights` is none of these, or the checkpoint has no codes to keep.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
    path = resolve(path)
    config = read_config(path / "config.json")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    if weights == "plain":
        backbone = load_model(path, config, dtype=dtype).to(device)
    else:
        from epmq.models.packed_loading import load_packed  # imports transformers, which looking does without

        backbone = load_packed(path, device, dtype, kernels=weights == "packed")
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
