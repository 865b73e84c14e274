"""ONNX, for onnxruntime on CPUs and phones, for browsers (onnxruntime-web, transformers.js), and for OpenVINO.

An encoder becomes one file: one run of the backbone gives the scores of every task. Files are laid out as
transformers.js expects: `onnx/model_q4.onnx` beside `config.json` and the tokenizer's or processor's files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.data.encoding import encode
from epmq.data.made import made_examples
from epmq.errors import InputError
from epmq.export.onnx_graph import Graph, open_session, run_session, save_graph
from epmq.export.onnx_layers import EXACT, put_operators, stored_bits
from epmq.export.target import Contents, Verified, experts_of
from epmq.files import write_json
from epmq.models.checkpoint import architecture_of
from epmq.models.codes import CodedCheckpoint
from epmq.models.meta import named_class
from epmq.models.multitask import MultiTaskModel, load

TITLE = "onnxruntime, browsers, phones"
PACKAGES: tuple[str, ...] = ("onnx", "onnxscript")
EXTRA, RUNTIME = "onnx", "onnxruntime"
# What models take, first of all, whose graphs can be traced on made-up examples.
MAIN_INPUTS = ("input_ids", "pixel_values")
FOLDER, TASKS = "onnx", "tasks.json"
# Largest difference over the largest score that another order of sums may make.
TOLERANCE = 1e-4


def check(contents: Contents) -> None:
    """See `epmq.export.target.Target`: all grids fit; models must take texts or pictures."""
    architecture = architecture_of(dict(contents.config))
    takes = getattr(named_class(architecture), "main_input_name", None)
    if takes not in MAIN_INPUTS:
        raise InputError(f"onnx: {architecture} takes {takes}; written are models of {' or '.join(MAIN_INPUTS)}")
    mixture = next(iter(experts_of(contents)), None)
    if mixture is not None:
        raise InputError(f"onnx: which experts of {mixture} are called depends on values, and a graph holds one choice")
    if contents.processor is None:
        raise InputError("onnx: base and experts have no tokenizer or image processor to make inputs with")


def write(source: CodedCheckpoint, folder: Path) -> list[Path]:
    """See `epmq.export.target.Target`."""
    return write_graphs(source, folder, EXACT, "")


def write_graphs(source: CodedCheckpoint, folder: Path, level: int | None, ending: str) -> list[Path]:
    """Write the graphs of a checkpoint; `ending` goes into their names.

    `level` is the accuracy level of products by codes; None writes the weights in float32 in the place of codes.
    """
    model = load(source.checkpoint.path, weights="plain" if level is None else "packed-exact")
    if hasattr(model.backbone, "set_attn_implementation"):
        model.backbone.set_attn_implementation("eager")  # T5's positions are lost in sdpa's graph
    if level is not None:
        put_operators(model.backbone, level)
    files = {}
    for name, graph in graphs_of(model).items():
        file = files[name] = folder / FOLDER / f"{name}_q{main_bits(source)}{ending}.onnx"
        file.parent.mkdir(exist_ok=True)
        save_graph(graph, file)
    write_json(folder / FOLDER / TASKS, tasks_of(model))
    return [file for one in files.values() for file in sorted(one.parent.glob(f"{one.name}*"))]


def graphs_of(model: MultiTaskModel) -> dict[str, Graph]:
    """Name of a file → the graph in it."""
    if not model.tasks and model.backbone.can_generate():
        from epmq.export.onnx_language import language_graphs

        return language_graphs(model)
    return {"model": graph_of(model)}


def tasks_of(model: MultiTaskModel) -> dict[str, Any]:
    """What each output of the graph answers: task → kind of the answer, and names of the classes."""
    heads = {task: model.head(task).task for task in model.tasks}
    return {task: {"answers": head.kind, "labels": list(head.names)} for task, head in heads.items()}


def main_bits(source: CodedCheckpoint) -> int:
    """The bits that most layers are stored in: transformers.js finds a file by them."""
    counts = Counter(stored_bits(grid) for grid in source.grids.values())
    return counts.most_common(1)[0][0]


class Scores(nn.Module):
    """The scores of all tasks, from one run of the backbone; of a model without heads what the backbone gives."""

    def __init__(self, model: MultiTaskModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of the names of the graph's outputs."""
        return tuple(named_outputs(self.model, dict(zip(self.names, values, strict=True))).values())


def named_outputs(model: MultiTaskModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Task → scores; of a model without heads name → tensor of what its backbone gives."""
    if model.tasks:
        return model.all_scores(**inputs)
    outputs = model.backbone(**inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def graph_of(model: MultiTaskModel) -> Graph:
    """The graph of an encoder with the heads of all its tasks."""
    inputs = example_inputs(model)
    with torch.no_grad():
        outputs = list(named_outputs(model, inputs))
    if clash := set(outputs) & set(inputs):
        raise InputError(f"onnx: a task is called like an input of the model: {', '.join(sorted(clash))}")
    dynamic = {name: {0: "batch"} | ({1: "tokens"} if value.ndim == 2 else {}) for name, value in inputs.items()}
    return Graph(Scores(model, list(inputs)), inputs, outputs, dynamic)


def example_inputs(model: MultiTaskModel) -> dict[str, Tensor]:
    """Inputs of a model that a graph is traced on."""
    batch = next(encode(made_examples(model.processor, "text"), model.processor))
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def verify(folder: Path, source: Path, examples: Sequence[dict[str, Any]]) -> Verified:
    """See `epmq.export.target.Target`: outputs differ by at most 1e-4 of the largest."""
    return verify_graphs(folder, source, examples, "", TOLERANCE)


def verify_graphs(
    folder: Path, source: Path, examples: Sequence[dict[str, Any]], ending: str, tolerance: float | None
) -> Verified:
    """Run the examples through the graphs and through `epmq.load`; a RuntimeError beyond `tolerance`."""
    import onnxruntime

    files = sorted((folder / FOLDER).glob(f"*_q?{ending}.onnx"))
    sessions = {file.name.partition("_q")[0]: open_session(file) for file in files}
    model = load(source)
    largest = error = 0.0
    agree, count = 0, 0
    for batch in examples:
        for ours, theirs in both_outputs(model, sessions, batch):
            error = max(error, float((ours - theirs).abs().max()))
            largest = max(largest, float(ours.abs().max()))
            agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            count += ours.argmax(-1).numel()
    if not count:
        raise RuntimeError(f"{folder}: there is nothing to try the graphs on")
    relative = error / max(largest, 1e-12)
    if tolerance is not None and not relative <= tolerance:
        raise RuntimeError(f"{folder}: onnxruntime is off by {relative:.2g} of the largest score; nothing is kept")
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "examples": sum(len(next(iter(batch.values()))) for batch in examples),
        "largest_error": float(f"{relative:.2g}"),
        "same_answers": round(agree / count, 4),
    }


def both_outputs(
    model: MultiTaskModel, sessions: Mapping[str, Any], batch: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model gives on a batch, and the same of its graphs."""
    if not model.tasks and model.backbone.can_generate():
        from epmq.export.onnx_language import written_scores

        yield written_scores(model, sessions, batch)
        return
    found = run_session(sessions["model"], batch)
    with torch.no_grad():
        expected = named_outputs(model, {one.name: batch[one.name] for one in sessions["model"].get_inputs()})
    yield from ((value, found[name]) for name, value in expected.items())
