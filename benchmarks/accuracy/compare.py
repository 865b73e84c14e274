"""`python -m benchmarks.accuracy.compare SUITE`: every method at every width on one suite, on test data.

Writes `benchmarks/results/<suite>.json`, one row a model, after each row; rows that are there already are kept unless
`--fresh` is given (or `--again` for their method, when its code has changed) or their settings or number of calibration
examples have changed. `python -m benchmarks.tables` makes the table from it.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.records import provenance, read_rows
from benchmarks.suites.__main__ import SUITES, build
from benchmarks.suites.build import suite_dir
from benchmarks.suites.pool import pool_recipe
from epmq.files import write_json
from epmq.models.multitask import load
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.run import run
from epmq.quantize_settings import BY_HEADS, ExpertGuided
from epmq.reporting.scores import gap_recovered, show_score

MERGES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"method": "task_arithmetic", "scaling": 0.3},
    "ties": {"method": "ties", "density": 0.2, "scaling": 1.0},
    "wudi": {"method": "wudi"},
    "tsv_m": {"method": "tsv_m"},
    "iso_c": {"method": "iso_c"},
    "iso_cts": {"method": "iso_cts"},
}
# Those of the large tables.
TABLED = ("task_arithmetic", "ties")
# Suites of language models are costly: one merge, and no 2 bits.
LANGUAGE_MERGES = ("task_arithmetic",)
# bits, group size, symmetric: one scale a row at 4 bits; a scale and a zero point a group of 64 below.
GRIDS = ((4, -1, True), (3, 64, False), (2, 64, False))
METHODS = ("rtn", "gptq", "e_pmq", "expert_guided")
# Calibration examples a task: as many as a recipe draws by default, but in the two suites whose runs are long.
SAMPLES = {"vision8": 256, "text8": 256, "text8lora": 128, "causal3": 64, "seq2seq": 256}
# The settings of expert_guided that a row is told apart by.
GUIDED = (*BY_HEADS[True], "adapt_heads")
KEY = ("suite", "merge", "method", "bits", "group_size", "symmetric", "seed")
TEST_SAMPLES = 500


def is_language(suite: ModuleType) -> bool:
    """Whether a suite is one of language models."""
    return hasattr(suite, "KIND")


def default(suite: ModuleType) -> dict[str, Any]:
    """The default recipe of expert_guided, spelled out, so that a row differs from one with other defaults."""
    settings = ExpertGuided()
    return {**settings.defaults(not is_language(suite)), "adapt_heads": settings.adapt_heads}


def settings(suite: ModuleType) -> Iterator[tuple[str, dict[str, Any]]]:
    """Merge name and quantization settings of every row that is not a base or an expert."""
    for merge in LANGUAGE_MERGES if is_language(suite) else TABLED:
        yield merge, {"method": "none"}
        for bits, group_size, symmetric in GRIDS[:2] if is_language(suite) else GRIDS:
            for method in METHODS:
                # The paper's form is measured at its own width; ours and the plain quantizers at all.
                if method == "e_pmq" and bits != 4:
                    continue
                chosen = default(suite) if method == "expert_guided" else {}
                grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
                yield merge, {"method": method, **grid, **chosen}


def measure(
    suite: ModuleType,
    root: Path,
    tasks: list[str],
    merge: str | dict[str, Any],
    quantize: dict[str, Any],
    **fields: Any,
) -> dict[str, Any]:
    """Run one recipe into a temporary directory; the report, with what a language model writes to the prompts.

    `merge` is one of `MERGES`, or its settings.
    """
    fields = {"samples": SAMPLES[suite.NAME], **fields}
    with tempfile.TemporaryDirectory(dir=root) as folder:
        recipe = pool_recipe(
            root,
            tasks,
            max_length=suite.MAX_LENGTH,
            data=getattr(suite, "DATA", None),
            merge=MERGES[merge] if isinstance(merge, str) else merge,
            quantize=quantize,
            output=str(Path(folder) / "out"),
            **fields,
        )
        report = run(recipe)
        prompts: dict[str, str] = getattr(suite, "PROMPTS", {})
        if prompts:
            model = load(str(recipe.output))
            report["written"] = {task: model.generate([text], 32)[0] for task, text in prompts.items()}
        return report


def guided_settings(quantize: dict[str, Any]) -> dict[str, Any]:
    """The settings of expert_guided among those of a quantization."""
    return {name: value for name, value in quantize.items() if name in GUIDED}


def samples_of(suite: str, method: str) -> int | None:
    """Calibration examples a task; None for what sees no data."""
    return SAMPLES[suite.removesuffix("-quick")] if method in METHODS[1:] else None


def row(suite: str, merge: str, quantize: dict[str, Any], report: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One line of the results file; the scores of the tasks go under the name of their metric."""
    quantized = quantize["method"] in METHODS
    return {
        "suite": suite,
        "merge": merge,
        "method": quantize["method"],
        "bits": quantize["bits"] if quantized else None,
        "group_size": quantize["group_size"] if quantized else None,
        "symmetric": quantize["symmetric"] if quantized else None,
        "samples": samples_of(suite, quantize["method"]),
        "settings": guided_settings(quantize),
        "metric": report["metric"],
        report["metric"]: report["scores"],
        "mean": report["mean_score"],
        **more,
        **provenance(),
    }


def add_gaps(rows: list[dict[str, Any]]) -> None:
    """Fill in `gap_recovered`: against GPTQ on the same merge and the same grid."""
    experts = next((r["mean"] for r in rows if r["merge"] == "experts"), None)

    def reference(r: dict[str, Any]) -> float | None:
        same = ("merge", "bits", "group_size", "symmetric", "seed")
        return next((q["mean"] for q in rows if q["method"] == "gptq" and all(q[k] == r[k] for k in same)), None)

    for r in rows:
        gptq = reference(r)
        r["gap_recovered"] = None if gptq is None or experts is None else gap_recovered(r["mean"], gptq, experts)


def identity(r: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart: there is one for each, whatever its settings."""
    return tuple(r[k] for k in KEY)


def order(r: dict[str, Any]) -> tuple[int, int, int]:
    """Where a row stands in the file: base, experts, merges; full precision first, then falling bits; by method."""
    merge = ["base", "experts", *MERGES].index(r["merge"])
    return merge, -(r["bits"] or 99), ("none", *METHODS).index(r["method"])


def compare(
    suite: ModuleType, tasks: list[str], quick: bool, merges: list[str], seed: int, again: str | None = None
) -> None:
    """Measure every row that is missing, and a method's rows again; another process may add rows at the same time."""
    console, name = Console(stderr=True), f"{suite.NAME}-quick" if quick else suite.NAME
    root, path = suite_dir(suite.NAME, quick), RESULTS / f"{name}.json"
    done = {identity(r): (r["settings"], r["samples"]) for r in read_rows(path)}
    common: dict[str, Any] = {"test_samples": TEST_SAMPLES, "seed": seed}

    def keep(new: dict[str, Any]) -> None:
        rows = sorted([*(r for r in read_rows(path) if identity(r) != identity(new)), new], key=order)
        add_gaps(rows)
        write_json(path, rows)
        gap = next(r["gap_recovered"] for r in rows if identity(r) == identity(new))
        score = show_score(new["metric"], new["mean"])
        text = f"{new['merge']:16} {new['method']:14} {new['bits'] or '':>2} {score:>8}"
        console.print(text + (f"  gap {100 * gap:5.1f} %" if gap is not None else ""))

    nothing = {"seed": seed, "seconds": None, "peak_memory_mb": None, "bytes": None}
    recipe = pool_recipe(root, tasks, max_length=suite.MAX_LENGTH, data=getattr(suite, "DATA", None), **common)
    for merge in ("base", "experts"):
        if (name, merge, "none", None, None, None, seed) not in done:
            scores = evaluate_experts(recipe, base=merge == "base")
            keep(row(name, merge, {"method": "none"}, scores, **nothing))
    for merge, quantize in settings(suite):
        if merge not in merges:
            continue
        grid = (None, None, None) if quantize["method"] == "none" else tuple(quantize[k] for k in KEY[3:6])
        current = guided_settings(quantize), samples_of(name, quantize["method"])
        if done.get((name, merge, quantize["method"], *grid, seed)) == current and quantize["method"] != again:
            continue
        report = measure(suite, root, tasks, merge, quantize, **common)
        seconds = round(sum(report["seconds"][phase] for phase in ("open", "merge and quantize")), 1)
        measured = {"seconds": seconds, "peak_memory_mb": report["peak_memory_mb"], "bytes": report["bytes"]}
        if "written" in report:
            measured["written"] = report["written"]
        keep(row(name, merge, quantize, report, seed=seed, **measured))


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.compare", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--tasks", help="comma-separated names; all by default")
    parser.add_argument("--merge", default=",".join(TABLED), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="the small form of the suite")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--again", choices=METHODS, help="measure the rows of this method anew")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration draw and the test draw")
    arguments = parser.parse_args()
    suite = importlib.import_module(f"benchmarks.suites.{arguments.suite}")
    tasks = arguments.tasks.split(",") if arguments.tasks else list(suite.TASKS)
    build(suite, tasks, arguments.quick)
    if arguments.fresh:
        (RESULTS / f"{suite.NAME}{'-quick' if arguments.quick else ''}.json").unlink(missing_ok=True)
    compare(suite, tasks, arguments.quick, arguments.merge.split(","), arguments.seed, arguments.again)


if __name__ == "__main__":
    main()
