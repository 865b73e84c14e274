"""How large and how fast a model is in the runtimes, beside the same model in float32 in each of them."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Column, Table
from safetensors.torch import save_file
from torch import Tensor

from epmq.errors import EnvironmentFault, InputError
from epmq.export import gguf, onnx
from epmq.export.onnx_layers import EXACT, INTEGER
from epmq.export.target import Contents, find_target, has_runtime
from epmq.files import read_json, write_json
from epmq.models.codes import CodedCheckpoint, Float32Checkpoint
from epmq.pipeline.exporting import contents_of, stored_examples
from epmq.reporting.report import REPORT
from epmq.runtime import hardware, now, progress_bars, versions

# Examples of a large batch, and tokens that a language model writes to each text.
LARGE, WRITTEN = 32, 48
# What is shown of a row → its field, and what that is divided by.
FIGURES: dict[str, tuple[str, float]] = {
    "MB": ("bytes", 1e6),
    "private MB": ("private_mb", 1),
    "resident MB": ("resident_mb", 1),
    "ms, one example": ("latency_ms", 1),
    "a second": ("throughput", 1),
}
CODES, FLOAT32 = "codes", "float32"
# Runtime, weights, and accuracy level of the graphs that onnxruntime is given.
GRAPHS = (("onnx", FLOAT32, None), ("onnx", CODES, EXACT), ("onnx-int8", CODES, INTEGER))
SECONDS = 1800


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        runtime: `torch`, `torch, packed`, `onnx`, `onnx-int8` or `llama.cpp`.
        weights: `codes` or `float32`.
        folder: of the checkpoint, or of the files of the runtime.
        bytes: of the files with weights.
    """

    runtime: str
    weights: str
    folder: str
    bytes: int


def bench(path: str | Path, *, threads: int = 1, progress: bool = True) -> list[dict[str, Any]]:
    """Measure a finished checkpoint in every runtime that is installed; the rows go into its `report.json` as well.

    Args:
        path: a checkpoint of `format: pack-quantized`.
        threads: of each runtime.
        progress: show progress bars.

    Returns:
        a row a subject: runtime, weights, bytes, `private_mb` and `resident_mb` (what the process holds for itself, and
        all that it holds, mapped files too, with a model that has run one example, beyond what it held before),
        `latency_ms` of one example, `throughput` and its unit: examples a second in batches of 32, or tokens a second
        that a language model writes to one text.

    Raises:
        InputError: the checkpoint is none.
        EnvironmentFault: a runtime ended without an answer; what it said is in it.
    """
    source = CodedCheckpoint(path)
    with progress_bars(progress) as bar, tempfile.TemporaryDirectory(prefix="epmq-bench-") as name:
        work = Path(name)
        _save_inputs(stored_examples(source.checkpoint.path), work)
        subjects = list(_subjects(source, work, bar))
        rows = [_measured(one, source, work, threads) for one in bar.track(subjects, description="measure")]
    report = source.checkpoint.path / REPORT
    if report.exists():
        facts = {"threads": threads, "date": now(), "hardware": hardware(), "versions": versions()}
        write_json(report, read_json(report) | {"bench": {"rows": rows, **facts}})
    return rows


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for the terminal, the ratio to float32 in the same runtime behind each figure."""
    table = Table("runtime", "weights", *(Column(name, justify="right") for name in FIGURES))
    for row in rows:
        table.add_row(row["runtime"], row["weights"], *figures_of(row, rows))
    return table


def figures_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row's `FIGURES`, each with its ratio to that of float32 in the same runtime, where that is among the rows."""
    runtime = row["runtime"].removesuffix("-int8").removesuffix(", packed")
    other = next((one for one in rows if (one["runtime"], one["weights"]) == (runtime, FLOAT32)), row)
    pairs = [(row[name] / divisor, other[name] / divisor) for name, divisor in FIGURES.values()]
    shown = [f"{one:.1f}" + ("" if other is row else f" ({one / two:.2f}×)") for one, two in pairs]
    return [*shown[:-1], f"{shown[-1]} {row['unit'].partition(' ')[0]}"]


def _save_inputs(examples: Sequence[Mapping[str, Any]], work: Path) -> None:
    """One example, and a large batch of the first ones over and over: the batch of the most tokens serves."""
    batch = max(examples, key=lambda one: next(iter(one.values())).shape[-1])
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    for name, count in (("one", 1), ("large", LARGE)):
        cut = {key: value[torch.arange(count) % len(value)].contiguous() for key, value in tensors.items()}
        save_file(cut, work / f"{name}.safetensors")


def _subjects(source: CodedCheckpoint, work: Path, bar: Progress) -> Iterator[Subject]:
    folder = source.checkpoint.path
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    entries = sum(int(torch.tensor(source.checkpoint.shape(name)).prod()) for name in source.plain)
    entries += sum(rows * columns for rows, columns in map(source.shape, source.grids))
    yield Subject("torch", FLOAT32, str(folder), 4 * entries)
    yield Subject("torch, packed", CODES, str(folder), size)
    for runtime, weights, write in _writers(source):
        place = work / f"{runtime}-{weights}"
        place.mkdir()
        shown = bar.add_task(f"export to {runtime}", total=1)
        files = write(place)
        bar.advance(shown)
        yield Subject(runtime, weights, str(place), sum(file.stat().st_size for file in files))


def _writers(source: CodedCheckpoint) -> Iterator[tuple[str, str, Callable[[Path], list[Path]]]]:
    """Runtime, weights, and what writes the files, of all runtimes that are installed and take the model."""
    contents = contents_of(source)
    if _fits("onnx", contents):
        for runtime, weights, level in GRAPHS:
            yield runtime, weights, partial(onnx.write_graphs, source, level=level, ending="")
    if _fits("gguf", contents):
        yield "llama.cpp", FLOAT32, lambda folder: [gguf.write_file(Float32Checkpoint(source), folder)]
        yield "llama.cpp", CODES, lambda folder: [gguf.write_file(source, folder)]


def _fits(name: str, contents: Contents) -> bool:
    """Whether the runtime of a target is installed and takes a checkpoint."""
    try:
        target = find_target(name)
        target.check(contents)
    except InputError:
        return False
    return has_runtime(target)


def _measured(subject: Subject, source: CodedCheckpoint, work: Path, threads: int) -> dict[str, Any]:
    """Measure a subject in a process of its own."""
    task, answer = work / "task.json", work / "answer.json"
    answer.unlink(missing_ok=True)
    settings = {"threads": threads, "written": WRITTEN, "source": str(source.checkpoint.path), "inputs": str(work)}
    write_json(task, {**asdict(subject), **settings})
    command = [sys.executable, "-m", "epmq.pipeline.bench_worker", str(task), str(answer)]
    ended = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    if not answer.exists():
        said = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise EnvironmentFault(f"{subject.runtime}, {subject.weights}: ended without an answer ({''.join(said)})")
    facts = {"runtime": subject.runtime, "weights": subject.weights, "bytes": subject.bytes}
    return {**facts, **read_json(answer)}
