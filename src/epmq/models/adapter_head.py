"""The task head of a LoRA adapter: what it brings, and what the base's file has of it, as PEFT puts them together."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from epmq.errors import InputError, error_context
from epmq.models.adapter import Adapter
from epmq.models.checkpoint import Checkpoint, architecture_of
from epmq.models.meta import has_task_head, named_class, rename, tied_names

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


@dataclass(frozen=True)
class AdapterHead:
    """A task head: the content of a `config.json` for it, and its tensors.

    Attributes:
        config: names the task class and its labels.
        tensors: name in the adapter, or in the task class for what the adapter does not have → tensor.
        from_base: names of those that are the base's as they are.
        read: names in the base's file of all that comes from there, or starts there.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    from_base: list[str]
    read: list[str]


def task_of(adapter: Adapter) -> str | None:
    """The task that an adapter names and that needs a head: the name of a task in PEFT, or of a class."""
    task, trained = str(adapter.config.get("task_type")), _trained_class(adapter)
    return task if task in _TASKS else trained if _task_class(trained) else None


def _trained_class(adapter: Adapter) -> str | None:
    """Without a task type, PEFT writes down the class that was trained."""
    trained = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    return trained if isinstance(trained, str) else None


def _task_class(name: str | None) -> Any:
    """The class of that name, if it has a task head; None for a head of tokens, which shares the embeddings."""
    named = named_class(name) if has_task_head(name) else None
    return None if named is None or named._tied_weights_keys else named


def adapter_head(adapter: Adapter, base: Checkpoint, own: Sequence[str], shared: Collection[str]) -> AdapterHead | None:
    """The task head of an adapter; None where it names no task, or neither it nor the base has a head for it.

    What the adapter changes of another head of the base, such as a masked language model's, is no task head.

    An adapter does not say how many labels it has: every size is tried that its tensors offer.

    Args:
        base: the checkpoint whose tensors complete the head.
        own: the adapter's names of tensors that the shared model does not have, or the base does not.
        shared: tensors of the shared model that the base has, by their names there.

    Raises:
        ValueError: the adapter brings a part of a head, and no task class is named, or fits, or a part is missing.
    """
    import transformers

    with error_context(adapter.path, "its base's config cannot be made into one with a head"):
        config = transformers.AutoConfig.for_model(**base.config)
    classes = list(_head_classes(adapter, base, config, brings=bool(own)))
    names = ", ".join(own)
    if not classes:
        if all(name in base for name in own):
            return None
        raise InputError(
            f"{adapter.path}: {names} is not in the base, and no task class is named for it "
            f"(task_type in {adapter.CONFIG}, such as SEQ_CLS)"
        )
    lacking = None
    for head_class in classes:
        for labels in _label_counts(adapter, own, config.num_labels or 2):
            head = _HeadParts(adapter, base, head_class, config, labels)
            if not head.fits(own):
                continue
            missing = head.missing(shared)
            if not missing:
                return head.read(own, shared)
            lacking = lacking or (head_class.__name__, missing)
    if not own:
        return None
    if lacking is not None:
        raise InputError(
            f"{adapter.path}: of the head of {lacking[0]}, {', '.join(lacking[1])} is neither in the base nor in the "
            "adapter, as training left it; name it in modules_to_save when training"
        )
    raise InputError(f"{adapter.path}: its head ({names}) does not fit {classes[0].__name__}")


def _head_classes(adapter: Adapter, base: Checkpoint, config: Any, brings: bool) -> Iterator[Any]:
    """Classes that the head may be of: by the task, by the class that was trained, or the base's own."""
    import transformers

    table = getattr(transformers, _TASKS.get(str(adapter.config.get("task_type")), ""), {})
    if type(config) in table:
        yield table[type(config)]
    for name in (_trained_class(adapter), architecture_of(base.config) if brings else None):
        if _task_class(name) is not None:
            yield _task_class(name)


def _label_counts(adapter: Adapter, own: Sequence[str], default: int) -> list[int]:
    """Numbers of labels to try: the config's own, and the first dimensions of the adapter's tensors."""
    shapes = [adapter.shape(name) if adapter.replaces(name) else adapter.change_shape(name) for name in own]
    counts = sorted({shape[0] for shape in shapes if shape} | {default})
    return counts if own else [default]


class _HeadParts:
    """A task class with so many labels, and where its tensors lie."""

    def __init__(self, adapter: Adapter, base: Checkpoint, head_class: Any, config: Any, labels: int) -> None:
        from accelerate import init_empty_weights

        self._adapter, self._base, self._config = adapter, base, base.config
        config.num_labels = labels
        with error_context(adapter.path, "its base's config gives no model with a head"), init_empty_weights():
            self._model = head_class._from_config(config)
        self._labels = dict(config.id2label)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self._adapted = rename(self._model, adapter.names)[0]
        self._stored = {
            name: stored
            for name, stored in rename(self._model, base.names)[0].items()
            if base.shape(stored) == self._shapes[name]
        }

    def fits(self, own: Sequence[str]) -> bool:
        """Whether all that the adapter brings beside the shared model is a part of this class, and of its shape."""
        inside = {stored: name for name, stored in self._adapted.items()}
        return all(name in inside and self._has_shape(inside[name], name) for name in own)

    def _has_shape(self, name: str, stored: str) -> bool:
        adapter, shape = self._adapter, self._shapes[name]
        if adapter.replaces(stored) and adapter.shape(stored) != shape:
            return False
        return not adapter.changes(stored) or adapter.change_shape(stored) in (shape, shape[::-1])

    def _parts(self, shared: Collection[str]) -> list[str]:
        """The head's own tensors: those that the shared model does not have, or the base lacks there."""
        prefix, tied = f"{self._model.base_model_prefix}.", tied_names(self._model)
        # The shared model may be the base model of this class, or have the same parts by the same names, as T5's.
        own = (name for name in self._shapes if name not in shared and name.removeprefix(prefix) not in shared)
        return [name for name in own if name not in tied]

    def missing(self, shared: Collection[str]) -> list[str]:
        """Parts that neither the adapter nor the base has."""
        replaced = {name for name, stored in self._adapted.items() if self._adapter.replaces(stored)}
        kept = {name for name in self._stored if not self._was_trained(name)}
        return sorted(name for name in self._parts(shared) if name not in replaced | kept)

    def _was_trained(self, name: str) -> bool:
        """Whether a tensor is in `modules_to_save`, by the end of a name as in PEFT: the base has another."""
        parts, saved = name.split("."), self._adapter.config.get("modules_to_save")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(module.endswith(str(one)) for module in modules for one in saved or ())

    def read(self, own: Sequence[str], shared: Collection[str]) -> AdapterHead:
        """The head, read."""
        tensors, from_base = dict[str, Tensor](), []
        for name in self._parts(shared):
            stored = self._adapted.get(name)
            if stored is None:
                tensors[name] = self._base.tensor(self._stored[name])
                from_base.append(name)
            else:
                tensors[stored] = self._tensor(name, stored)
        ordered = {name: tensors.pop(name) for name in own if name in tensors} | tensors
        ids = {name: index for index, name in self._labels.items()}
        labels = {"id2label": {str(index): name for index, name in self._labels.items()}, "label2id": ids}
        config = {**self._config, "architectures": [type(self._model).__name__], **labels}
        read = [self._stored[name] for name in self._parts(shared) if name in self._stored]
        return AdapterHead(config, ordered, from_base, read)

    def _tensor(self, name: str, stored: str) -> Tensor:
        adapter = self._adapter
        start = adapter.tensor(stored) if adapter.replaces(stored) else self._base.tensor(self._stored[name])
        if not adapter.changes(stored):
            return start
        turned = adapter.change_shape(stored) != self._shapes[name]
        return start.float() + adapter.change(stored, turned)
