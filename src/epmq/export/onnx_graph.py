"""A model, or a part of it, as an ONNX file: traced, with the sizes named that may change; and run in onnxruntime."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import error_context

OPSET = 21


@dataclass(frozen=True)
class Graph:
    """What becomes a file.

    Attributes:
        module: takes the inputs by position and gives a tuple of tensors.
        inputs: name → example; all with the same batch size.
        outputs: names of what it gives.
        dynamic: name of an input → dimension → its name, of those that may change; "" is the sum of others.
        change: is called with the traced model (onnx_ir) before it is written.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, str]]
    change: Callable[[Any], None] = lambda model: None


def save_graph(graph: Graph, file: Path) -> None:
    """Trace a graph and write it, weights and all; large weights lie beside it."""
    names = {name for sizes in graph.dynamic.values() for name in sizes.values() if name}
    symbols = {name: torch.export.Dim(name) for name in sorted(names)} | {"": torch.export.Dim.DYNAMIC}
    shapes: list[Any] = [{axis: symbols[name] for axis, name in graph.dynamic[one].items()} for one in graph.inputs]
    arguments = signature(graph.module.forward).parameters.values()
    named = sum(one.kind is Parameter.POSITIONAL_OR_KEYWORD for one in arguments)
    if named < len(shapes):  # what goes into *past is one argument to torch
        shapes[named:] = [tuple(shapes[named:])]
    with error_context(file.name, "the model cannot be traced"), quietly(), torch.no_grad():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(shapes),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert program is not None
    graph.change(program.model)
    program.save(str(file))


def open_session(file: Path) -> Any:
    """A graph in onnxruntime, on the CPU: as many threads as torch has, and no messages but errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a graph by name; of the inputs it takes those that it asks for."""
    taken = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, taken)), strict=True))


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the exporter says of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
