"""`python -m benchmarks.speed.shapes [NAME …]`: what a whole run costs at full size, without anybody's weights.

Base and experts have a published model's shape and random weights; calibration is random as well. Time and memory do
not depend on what the weights say. Writes `benchmarks/results/shapes.json`, one row a shape, after each run; rows
that are there already are kept unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console

from benchmarks import RESULTS
from benchmarks.records import provenance, read_rows
from epmq.calibration.engine import CalibrationEngine
from epmq.calibration.sequential import BlockStep, SequentialCalibrator
from epmq.files import cache_dir, whole_directory, write_json
from epmq.merging.experts import ExpertSet
from epmq.merging.merged import MergedWeights
from epmq.models.blocks import block_linears
from epmq.models.checkpoint import DTYPE_NAMES, Checkpoint
from epmq.models.meta import tied_names
from epmq.models.writer import CheckpointWriter
from epmq.pipeline import run as pipeline
from epmq.quantization.hessian import Moments
from epmq.quantization.objective import Objective

VISION = {"image_size": 224, "projection_dim": 512}
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
FLAN = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Standard deviations of the random weights, and of what sets an expert apart from the base.
SCALE, NOISE = 0.02, 0.002
BATCH = 16
# What each phase's seconds are spent in; a phase inside another one counts for itself alone.
WATCHED: tuple[tuple[Any, str, str], ...] = (
    (ExpertSet, "__init__", "open"),
    (Checkpoint, "check_finite", "check"),
    (MergedWeights, "tensor", "merge"),
    (MergedWeights, "parts", "merge"),
    (SequentialCalibrator, "resume", "forward"),
    (BlockStep, "run", "forward"),
    (Moments, "add", "moments"),
    (Objective, "add_task", "targets"),
    (CalibrationEngine, "_solve", "solve"),
    (CheckpointWriter, "write", "write"),
    (CheckpointWriter, "sync", "write"),
    (CheckpointWriter, "finish", "write"),
    (pipeline, "check_reloaded", "read back"),
    (pipeline, "note_unopened", "reopen"),
)


@dataclass(frozen=True)
class Shape:
    """A published model's shape, and how it is calibrated.

    Attributes:
        model_class: name of the model's class in transformers.
        config: arguments of its config class.
        depth: arguments of its config class that count layers; all of them are `layers`.
        dtype: of base and experts on disk.
        samples: a task.
        tokens: of a text; None for images.
        targets: tokens of a target text.
    """

    model_class: str
    config: dict[str, Any]
    layers: int
    experts: int
    samples: int
    depth: tuple[str, ...] = ("num_hidden_layers",)
    dtype: torch.dtype = torch.float32
    tokens: int | None = None
    targets: int = 0

    def meta_model(self) -> Any:
        """The model on the meta device."""
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**self.config, **dict.fromkeys(self.depth, self.layers), dtype=self.dtype)
        with torch.device("meta"):
            return model_class(config)

    def batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """One task's random calibration batches."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for start in range(0, self.samples, BATCH):
            size = min(BATCH, self.samples - start)
            if self.tokens is None:
                batches.append({"pixel_values": torch.randn(size, 3, 224, 224, generator=generator)})
                continue
            ids = torch.randint(2, self.config["vocab_size"], (size, self.tokens), generator=generator)
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            if self.targets:
                labels = torch.randint(2, self.config["vocab_size"], (size, self.targets), generator=generator)
                batches[-1]["labels"] = labels
        return batches

    def stored(self) -> dict[str, torch.Size]:
        """Names and sizes of the tensors in a checkpoint: without the copies of shared ones."""
        model = self.meta_model()
        shared = tied_names(model)
        if self.config.get("tie_word_embeddings") is False:
            # transformers 5 calls every T5 tied; FLAN-T5's files hold an output layer of its own all the same.
            shared = {name: leader for name, leader in shared.items() if name != "lm_head.weight"}
        return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in shared}

    @property
    def tokens_a_task(self) -> int:
        """Tokens a task, targets among them."""
        if self.tokens is None:
            return self.samples * (1 + (224 // self.config["patch_size"]) ** 2)
        return self.samples * (self.tokens + self.targets)


# On disk in the dtype in which each is published.
SHAPES = {
    "clip-vit-b32": Shape(
        "CLIPVisionModel",
        {**VISION, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32},
        layers=12,
        experts=8,
        samples=32,
    ),
    "llama-1b": Shape(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
        layers=16,
        experts=3,
        samples=8,
        dtype=torch.bfloat16,
        tokens=128,
    ),
    "flan-t5-base": Shape(
        "T5ForConditionalGeneration",
        {**FLAN, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_heads": 12, "decoder_start_token_id": 0},
        layers=12,
        depth=("num_layers", "num_decoder_layers"),
        experts=8,
        samples=16,
        tokens=64,
        targets=16,
    ),
    "clip-vit-l14": Shape(
        "CLIPVisionModel",
        {**VISION, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14},
        layers=24,
        experts=8,
        samples=12,
    ),
}


def find_shape(name: str) -> Shape:
    """A shape by name; `NAME-quick` has all widths but two layers a stack."""
    shape = SHAPES[name.removesuffix("-quick")]
    return replace(shape, layers=2) if name.endswith("-quick") else shape


def tasks(shape: Shape) -> list[str]:
    """Names of the experts."""
    return [f"task{k}" for k in range(shape.experts)]


def write_models(shape: Shape, root: Path, device: str = "cpu") -> None:
    """Write base and experts under `root`, a tensor at a time; what is there already is kept.

    Numbers are drawn on `device`, and are others on another.
    """
    model = shape.meta_model()
    sizes = shape.stored()
    specs = {name: (DTYPE_NAMES[shape.dtype], tuple(size)) for name, size in sizes.items()}
    for source in ("base", *tasks(shape)):
        if (root / source).exists():
            continue
        with whole_directory(root / source) as folder:
            with CheckpointWriter(folder, specs, shard_bytes=1 << 28) as writer:
                for name, size in sizes.items():
                    tensor = _random(size, "base", name, device).mul_(SCALE if len(size) > 1 else NOISE)
                    if len(size) == 1 and name.endswith("weight"):
                        tensor += 1
                    if source != "base":
                        tensor += _random(size, source, name, device).mul_(NOISE)
                    writer.write(name, tensor.to(shape.dtype))
                writer.finish()
            model.config.architectures = [shape.model_class]
            model.config.save_pretrained(folder)


def _random(size: torch.Size, source: str, name: str, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{source}/{name}".encode()))
    return torch.randn(size, generator=generator, device=device)


class Clock:
    """Seconds by phase: at any time the innermost phase's clock runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open, self._since = ["other"], time.perf_counter()

    def _count(self) -> None:
        moment = time.perf_counter()
        self.seconds[self._open[-1]] += moment - self._since
        self._since = moment

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run this phase's clock for the length of a `with` block."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def watch(self, owner: Any, name: str, phase: str) -> Any:
        """For the length of a `with` block, count the time in a function of a module or class for a phase."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **settings: Any) -> Any:
            with self.phase(phase):
                result = original(*args, **settings)
            return self._each(result, phase) if isinstance(result, Generator) else result

        return patch.object(owner, name, timed)

    def _each(self, parts: Iterator[Any], phase: str) -> Iterator[Any]:
        """What a generator yields; a generator works when it is asked for the next."""
        end = object()
        while True:
            with self.phase(phase):
                part = next(parts, end)
            if part is end:
                return
            yield part

    def read(self) -> dict[str, float]:
        """Rounded seconds by phase so far, in the order in which phases were first left."""
        self._count()
        return {name: round(value, 1) for name, value in self.seconds.items()}


def measure(name: str, root: Path) -> dict[str, Any]:
    """Run the pipeline on one shape in this process; the row for the results file."""
    shape = find_shape(name)
    recipe = {
        "base": str(root / "base"),
        "experts": [{"name": task, "model": str(root / task)} for task in tasks(shape)],
        "merge": {"method": "task_arithmetic"},
        "quantize": {"method": "expert_guided", "bits": 4, "group_size": -1},
        "output": str(root / "out"),
        "device": "cpu",
    }
    calibration = {task: shape.batches(seed) for seed, task in enumerate(tasks(shape))}
    clock, cpu = Clock(), time.process_time()
    with ExitStack() as stack:
        for owner, function, phase in WATCHED:
            stack.enter_context(clock.watch(owner, function, phase))
        report = pipeline.run(recipe, calibration=calibration, evaluate=False, progress=False)
    seconds, cpu = clock.read(), time.process_time() - cpu
    check_output(shape, root / "out", {layer["name"]: layer["bits"] for layer in report["layers"]})
    inputs = [file for source in ("base", *tasks(shape)) for file in (root / source).glob("*.safetensors")]
    return {
        "name": name,
        "parameters": sum(size.numel() for size in shape.stored().values()),
        "experts": shape.experts,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "samples": shape.samples,
        "tokens": shape.tokens_a_task,
        "layers": len(report["layers"]),
        "seconds": seconds,
        "cpu_seconds": round(cpu, 1),
        "peak_memory_mb": report["peak_memory_mb"],
        "input_bytes": sum(file.stat().st_size for file in inputs),
        "output_bytes": report["bytes"],
        "notes": report["notes"],
        **provenance(),
    }


def check_output(shape: Shape, path: Path, reported: dict[str, int]) -> None:
    """Check that what was written has every tensor, at its size, and finite scales; `reported` are layers and bits.

    Raises:
        ValueError: it does not; the tensor is named.
    """
    model, written = shape.meta_model(), Checkpoint(path)
    missing = {name for name, _ in block_linears(model)} - set(reported)
    if missing:
        raise ValueError(f"{path}: not in the report: {sorted(missing)}")
    expected, ties = {name: tuple(size) for name, size in shape.stored().items()}, tied_names(model)
    for layer, bits in reported.items():
        rows, columns = expected[f"{layer}.weight"]
        expected[f"{layer}.weight_scale"] = (rows, 1)
        if isinstance(model.get_submodule(layer), torch.nn.Embedding):  # int8, with scales for whatever is tied to it
            followers = [name for name, leader in ties.items() if leader == f"{layer}.weight"]
            expected |= {f"{name}_scale": (rows, 1) for name in followers}
            continue
        del expected[f"{layer}.weight"]
        expected |= {f"{layer}.weight_packed": (rows, columns * bits // 32), f"{layer}.weight_shape": (2,)}
    shapes = {name: written.shape(name) for name in written.names}
    for name in expected.keys() | shapes.keys():
        if expected.get(name) != shapes.get(name):
            raise ValueError(f"{path}: {name} is {shapes.get(name)}, not {expected.get(name)}")
    written.check_finite([name for name in written.names if not name.endswith(("_packed", "_shape"))])


def measure_apart(name: str, keep: bool) -> dict[str, Any]:
    """Write the models of a shape and measure it in a process of its own, so that peak memory is that run's."""
    root = cache_dir() / "shapes" / name
    try:
        write_models(find_shape(name), root)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "benchmarks.speed.shapes", name, "--worker", file.name]
            subprocess.run(command, check=True)
            return json.loads(Path(file.name).read_text())
    finally:
        shutil.rmtree(root / "out", ignore_errors=True)
        if not keep:
            shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    """Read the command line and measure what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.shapes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SHAPES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="all widths, but two layers a stack")
    parser.add_argument("--fresh", action="store_true", help="measure anew what has a row already")
    parser.add_argument("--keep", action="store_true", help="keep the models under EPMQ_CACHE (3 to 11 GB a shape)")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        (name,) = arguments.names
        write_json(Path(arguments.worker), measure(name, cache_dir() / "shapes" / name))
        return
    if unknown := set(arguments.names) - SHAPES.keys():
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    path, end = RESULTS / f"shapes{'-quick' * arguments.quick}.json", "-quick" * arguments.quick
    for name in [shape + end for shape in arguments.names or SHAPES]:
        if arguments.fresh or name not in [row["name"] for row in read_rows(path)]:
            row = measure_apart(name, arguments.keep)
            rows = {**{row["name"]: row for row in read_rows(path)}, name: row}
            write_json(path, [rows[shape + end] for shape in SHAPES if shape + end in rows])
            Console(stderr=True).print(f"{name}: {sum(row['seconds'].values()):.0f} s, {row['peak_memory_mb']:.0f} MB")


if __name__ == "__main__":
    main()
