"""What a task's head and its data have to do with each other: checked before anything is computed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from epmq.data.encoding import text_length
from epmq.data.examples import Examples
from epmq.data.labels import EXAMPLES_OF
from epmq.data.processors import tokenizer_of
from epmq.data.windows import join_words, windows
from epmq.errors import InputError, error_context
from epmq.merging.readers import ExpertReader
from epmq.models.heads import POOLER, load_head, read_head_file
from epmq.models.tasks import LABEL_INPUTS, Task, output_names, task_of_settings
from epmq.pipeline.scoring import are_entities

# What each kind of head is scored on.
NEEDS = {
    **dict.fromkeys(("class", "number", "labels"), "texts or images with a label"),
    "tags": "rows with a list of words and a class for each (columns 'tokens' and 'tags', or what words and tags name)",
    "span": "rows with columns 'question', 'context' and 'answers' (or what question, context and references name)",
    "choice": "rows with a text, 'choices' and a label (or the columns that text, choices and label name)",
}
NO_CONFIG = "transformers makes no config of that of its task class"


def task_of(expert: ExpertReader) -> Task | None:
    """What an expert's head answers; None if it has none.

    Raises:
        MissingError, InputError: the head's file or config cannot be read; it is named.
    """
    if expert.head_file is not None:
        return task_of_head(expert.head_file)
    if expert.head_config is None:
        return None
    with error_context(expert.path, NO_CONFIG):
        return task_of_settings(expert.head_config)


def task_of_head(file: Path) -> Task:
    """What the head in a file answers; errors as in `task_of`."""
    settings = read_head_file(file)[1]
    if "architecture" not in settings:
        return load_head(file).task
    with error_context(file, NO_CONFIG):
        return task_of_settings(settings, settings.get("config"))


def calibration_inputs(batch: dict[str, Any], task: Task | None, model: Any) -> dict[str, Any]:
    """A batch as the shared model takes it: without labels, which are not used, whatever they are.

    Choices that stand in a dimension of their own become texts; an encoder–decoder whose task class makes its decoder's
    inputs of the encoder's gets them made so.
    """
    writes = task is None and model.config.is_encoder_decoder
    if not writes:
        batch = {name: value for name, value in batch.items() if name not in LABEL_INPUTS}
    ids = batch.get("input_ids")
    if task is None or not isinstance(ids, torch.Tensor):
        return batch
    if task.kind == "choice" and ids.ndim == 3:
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim > 2}
        batch = {**batch, **{name: value.flatten(0, 1) for name, value in tensors.items()}}
    if not model.config.is_encoder_decoder or "decoder_input_ids" in batch:
        return batch
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    if shift is None:  # it makes them itself, or the first forward says that they are missing
        return batch
    batch = {**batch, "decoder_input_ids": shift(batch["input_ids"])}
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        batch["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return batch


def check_ends(batch: dict[str, Any], task: Task | None, model: Any) -> None:
    """Check that a class that scores the end of a text finds it in each text of a batch.

    That is the end-of-text token, as often in each; or the last token (a `summary_type` of `last`, as XLNet's), which
    must not be padding.
    """
    ids, config, mask = batch.get("input_ids"), model.config, batch.get("attention_mask")
    padded = isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask[:, -1].all()
    if task is not None and padded and getattr(config, "summary_type", None) == "last":
        raise InputError(f"{task.title} scores a text at its last token, which must not be padding: batch_size: 1")
    at_end = task is not None and task.title.endswith("ForSequenceClassification") and config.is_encoder_decoder
    if task is None or not at_end or not isinstance(ids, torch.Tensor) or not len(ids):
        return
    counts = ids.eq(config.eos_token_id).sum(-1).tolist()
    if min(counts) < max(counts) or not max(counts):
        raise InputError(
            f"{task.title} scores a text at its end-of-text token ({config.eos_token_id}), which all must have as "
            f"often: here they have it {min(counts)} to {max(counts)} times"
        )


def check_outputs(head_file: Path | None, model: Any) -> None:
    """Check that a model gives what a head of epmq's own form is put on."""
    if head_file is None or "architecture" in read_head_file(head_file)[1]:
        return
    names = output_names(type(model))
    needed = "pooler_output" if load_head(head_file).pooling == POOLER else "last_hidden_state"
    if names is not None and needed not in names:
        raise InputError(f"{head_file} is a head on {needed}, which {type(model).__name__} does not give")


def as_scored(examples: Examples, task: Task | None, metric: str | None, source: str) -> Examples:
    """Examples with the way in which a task's head is scored on them; without a head, as their kind is.

    Raises:
        InputError: they cannot be scored with this head, or not by this metric; what is needed is named.
    """
    by_kind = examples.kind == "chat" and (metric == "log_perplexity" or examples.labels is None)
    if task is None or by_kind:
        return replace(examples, metric=metric)
    if task.kind is None:
        raise InputError(
            f"{task.title} cannot be scored: only heads for classes, numbers, words, answers to questions and choices "
            "are; leave out its evaluation, and ask epmq.load(output) for its scores"
        )
    if examples.kind == "batches":
        examples = _with_labels(examples, task)
    elif examples.kind not in EXAMPLES_OF[task.kind]:
        raise InputError(f"{task.title} is scored on {NEEDS[task.kind]}; {source} has {examples.kind} examples")
    if examples.labels is None:
        raise InputError(f"{source} has no labels: {task.title} is scored on {NEEDS[task.kind]}")
    _check_classes(examples, task, source)
    if task.kind == "tags":
        metric = metric or ("f1" if are_entities(task.names) else "accuracy")
        if metric == "f1" and not are_entities(task.names):
            raise InputError(
                f"metric: f1 is that of entities, whose classes are called O, B-… and I-…; {task.title}'s are not"
            )
    return replace(examples, metric=metric, labelled=task.kind)


def _with_labels(examples: Examples, task: Task) -> Examples:
    """Ready batches with their labels beside them, not in them."""
    given, reader = [batch.get("labels") for batch in examples.inputs], task.labels
    if reader is None or task.kind == "span" or not all(isinstance(one, torch.Tensor) and one.ndim for one in given):
        raise InputError("batches examples cannot be scored; only calibrated on: they need a tensor 'labels' each")
    rows = [row for one in given for row in one.tolist()]
    sizes = [len(next(iter(batch.values()))) for batch in examples.inputs]
    if [len(one) for one in given] != sizes:
        raise InputError("batches examples: 'labels' must have a row for each of the inputs")
    try:
        labels = reader.array([reader.read(row) for row in rows])
    except InputError as error:
        raise InputError(f"batches examples: 'labels' {error}") from None
    inputs = [{name: one for name, one in batch.items() if name not in LABEL_INPUTS} for batch in examples.inputs]
    return replace(examples, inputs=inputs, labels=labels)


def _check_classes(examples: Examples, task: Task, source: str) -> None:
    """Check that labels are among the classes, or among an example's own choices."""
    labels = examples.labels
    if task.kind == "class" and task.size is not None and not 0 <= labels.min() <= labels.max() < task.size:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"label {wrong} but the head has {task.size} classes")
    if task.kind == "choice" and examples.kind == "choices":
        for number, (label, (_, choices)) in enumerate(zip(labels, examples.inputs)):
            if not 0 <= label < len(choices):
                raise InputError(f"{source}, example {number}: label {label} but there are {len(choices)} choices")


def try_windows(examples: Examples, processor: Any, max_length: int | None, positions: int | None) -> None:
    """Cut the texts that are answered in windows, to see that the tokenizer can; errors as in `windows`.

    `positions` are those that the model has, where texts are longer.
    """
    if examples.kind not in ("question", "words"):
        return
    tokenizer, texts = tokenizer_of(processor), examples.inputs
    if examples.kind == "words":
        texts = [join_words(words)[0] for words in texts]
    windows(tokenizer, texts, text_length(tokenizer, max_length, positions))
