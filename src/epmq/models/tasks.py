"""What a task head answers, by the tables that transformers keeps of its own classes."""

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epmq.data.labels import Labels

# transformers' tables of task classes → what their heads answer (`epmq.data.labels.Labels`), or None where epmq can
# neither ask nor score them. The first table that has a class says what it is.
TABLES: dict[str, str | None] = {
    "DOCUMENT_QUESTION_ANSWERING": None,
    "TABLE_QUESTION_ANSWERING": None,
    "SEQUENCE_CLASSIFICATION": "class",
    "IMAGE_CLASSIFICATION": "class",
    "AUDIO_CLASSIFICATION": "class",
    "NEXT_SENTENCE_PREDICTION": "class",
    "TOKEN_CLASSIFICATION": "tags",
    "QUESTION_ANSWERING": "span",
    "MULTIPLE_CHOICE": "choice",
}
# How the texts of each are taken.
USE_OF = {"span": "question", "tags": "words", "choice": "choices"}
# What an input is called that a model is trained with and that no answer needs.
LABEL_INPUTS = ("labels", "start_positions", "end_positions", "next_sentence_label")


@dataclass(frozen=True)
class Task:
    """What a head answers.

    Attributes:
        kind: that of its labels; None for a head that can only be called, such as a masked language model's.
        title: what an error calls the head.
        names: names of the classes; empty where there are none or they are not known.
        size: how many classes or numbers it gives; None if that is not known.
    """

    kind: str | None
    title: str
    names: tuple[str, ...] = ()
    size: int | None = None

    @property
    def use(self) -> str:
        """How its texts are read (`epmq.data.examples.USES`)."""
        return USE_OF.get(self.kind or "", "text")

    @property
    def labels(self) -> Labels | None:
        """How its labels are read; None if it has none."""
        return None if self.kind is None else Labels(self.kind, self.names, self.size)


def task_of_class(architecture: str, config: Any) -> Task:
    """What a task class answers, with the config of transformers that it is built from."""
    kind = kind_of_class(architecture)
    if kind in (None, "span", "choice"):
        return Task(kind, architecture)
    names = getattr(config, "id2label", None) or {}
    size = int(config.num_labels)
    problem = getattr(config, "problem_type", None)
    if kind == "class" and (problem == "regression" or (problem is None and size == 1)):
        kind = "number"
    elif kind == "class" and problem == "multi_label_classification":
        kind = "labels"
    known = tuple(str(names[index]) for index in sorted(names)) if kind != "number" or size > 1 else ()
    return Task(kind, architecture, known if len(known) == size else (), size)


def kind_of_class(architecture: str) -> str | None:
    """What the heads of a class answer, as far as its name tells; None if epmq cannot ask them."""
    from transformers.models.auto import modeling_auto

    for table, kind in TABLES.items():
        values = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values()
        if any(architecture == name or (not isinstance(name, str) and architecture in name) for name in values):
            return kind
    return None


def task_of_settings(settings: Mapping[str, Any], config: Any = None) -> Task:
    """What a head answers, by an expert's `config.json` or the settings of a head file with an `architecture`.

    A ValueError says that transformers makes no config of it.
    """
    import transformers

    content = dict(settings if config is None else config)
    architecture = settings.get("architecture") or settings["architectures"][0]
    return task_of_class(architecture, transformers.AutoConfig.for_model(**content))


def output_names(model_class: Any) -> list[str] | None:
    """What a class of transformers gives, as its forward says; None if that does not say it."""
    try:
        returned = typing.get_type_hints(model_class.forward).get("return")
    except Exception:  # a name that is imported for type checkers only
        return None
    found = [kind for kind in (*typing.get_args(returned), returned) if hasattr(kind, "__dataclass_fields__")]
    return [name for kind in found for name in kind.__dataclass_fields__] or None


def input_names(module: Any) -> tuple[set[str], bool]:
    """The inputs that a model's forward names, but for labels; and whether it hands on others."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return named - set(LABEL_INPUTS), any(one.kind is one.VAR_KEYWORD for one in parameters)
