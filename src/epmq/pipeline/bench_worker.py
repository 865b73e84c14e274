"""One model in one runtime, measured in a process of its own: memory, latency, throughput."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from epmq.files import read_json, write_json
from epmq.runtime import return_freed_memory

# A figure is the median of runs for so many seconds, of at least so many.
SECONDS, FEWEST = 3.0, 5
Inputs = dict[str, Any]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """What `epmq.pipeline.bench` asks for in a task."""
    import psutil
    import torch
    from safetensors.torch import load_file

    import epmq.export.onnx  # what is imported is no model's memory
    import epmq.models.multitask  # noqa: F401

    torch.set_num_threads(task["threads"])
    one, large = (load_file(Path(task["inputs"], f"{name}.safetensors")) for name in ("one", "large"))
    process = psutil.Process()
    return_freed_memory()
    before = process.memory_full_info()
    run, writes = open_model(task)
    tokens = task["written"] if writes else 0
    with torch.no_grad():
        latency = seconds_of(lambda: run(one, tokens))
        return_freed_memory()  # what is free is the allocator's, and a large batch's tensors are none of the model's
        memory = process.memory_full_info()
        throughput = tokens / latency if writes else len(next(iter(large.values()))) / seconds_of(lambda: run(large, 0))
    return {
        "private_mb": (memory.uss - before.uss) / 1e6,
        "resident_mb": (memory.rss - before.rss) / 1e6,
        "latency_ms": 1000 * (latency / tokens if writes else latency),
        "throughput": throughput,
        "unit": "tokens a second" if writes else "examples a second",
    }


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of a run: the median of several, after the first."""
    run()
    start = time.perf_counter()
    times: list[float] = []
    while len(times) < FEWEST or time.perf_counter() - start < SECONDS:
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return median(times)


def open_model(task: dict[str, Any]) -> tuple[Callable[[Inputs, int], object], bool]:
    """What runs a model on inputs, or lets it write so many tokens; and whether it writes."""
    if task["runtime"] == "llama.cpp":
        from epmq.export.gguf_run import open_runner

        return open_runner(next(Path(task["folder"]).glob("*.gguf")), task["threads"])
    from epmq.export.onnx import named_outputs
    from epmq.export.onnx_graph import open_session, run_session
    from epmq.models.multitask import load

    if task["runtime"].startswith("torch"):
        model = load(task["source"], weights="packed" if task["weights"] == "codes" else "plain")
        writes = not model.tasks and model.backbone.can_generate()
        return (write_by_torch(model) if writes else lambda inputs, _: named_outputs(model, inputs)), writes
    sessions = {file.name.partition("_q")[0]: open_session(file) for file in Path(task["folder"]).glob("*/*.onnx")}
    session = sessions.get("model")
    if session is not None and not any(one.name == "position_ids" for one in session.get_inputs()):
        return (lambda inputs, _: run_session(session, inputs)), False
    from epmq.export.onnx_language import write_greedily

    return (lambda inputs, tokens: write_greedily(sessions, inputs, tokens)), True


def write_by_torch(model: Any) -> Callable[[Inputs, int], object]:
    """What lets a language model write tokens, the likeliest ones, whatever ends its texts."""

    def write(inputs: Inputs, tokens: int) -> object:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model.backbone.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    return write


if __name__ == "__main__":
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    given, wanted = map(Path, sys.argv[1:])
    write_json(wanted, measure(read_json(given)))
