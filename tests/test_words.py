"""Code and pages use the words of the field: old names do not come back."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")

# Names in code that nothing but this project used → what to say.
NAMES = {
    "Walk": "SequentialCalibrator",
    "Stop": "PausedForward",
    "ExpertStream": "Teacher",
    "Followers": "HeadRefitter",
    "Sum": "ResidualAdd",
    "Aim": "LayerTarget",
    "Tap": "collect",
    "Job": "PreparedRun",
    "Work": "Workdir",
    "add_times": "addmm_",
    "blame": "error_context",
    "conclude": "on_finished",
    "drop_tensors": "to_meta",
    "emit_head": "a finished Block",
    "emit_layer": "a finished Block",
    "emit_output": "a finished Block",
    "find_aims": "layer targets",
    "find_sums": "find_residual_adds",
    "foresee": "forecast",
    "hollow": "stub",
    "lineage": "compatibility",
    "listen": "add_batch",
    "load_block": "materialize",
    "naming": "error_context",
    "naming_place": "error_context",
    "no_worse": "rtn_fallback",
    "quicken": "use_fast_matmul",
    "quickened": "use_fast_matmul",
    "skeleton": "meta_model",
    "spill": "offload",
    "sum_": "skip_input",
    "sweep": "remove_stale_workdir",
    "uncollected": "gc_paused",
}
# Functions: the same words are plain English elsewhere.
FUNCTIONS = {
    "fold": "add_task",
    "gather": "collect",
    "reach": "run_until",
    "see": "add_batch",
    "settled": "resolved",
    "shown": "outputs_for",
    "times": "matmul",
    "trial": "measure",
}
# Modules that have moved, wherever a page or docstring names them.
MODULES = {
    "answers.py": "calibration/head_refit.py",
    "batches.py": "data/encoding.py",
    "foresee.py": "reproduce/forecast.py",
    "gather.py": "calibration/collect.py",
    "imports.py": "runtime.py",
    "lineage.py": "merging/compatibility.py",
    "lm_scores.py": "reproduce/lm_eval.py",
    "merging.py": "merging/methods.py",
    "method_settings.py": "merge_settings.py or quantize_settings.py",
    "moments.py": "quantization/hessian.py",
    "plan.py": "pipeline/cost.py",
    "products.py": "matmul.py",
    "skeleton.py": "models/meta.py",
    "solvers.py": "quantization/gptq.py",
    "sources.py": "merging/experts.py",
    "spec.py": "recipe.py",
    "spill.py": "calibration/offload.py",
    "streams.py": "calibration/teacher.py",
    "trial.py": "pipeline/measure.py",
    "walk.py": "calibration/sequential.py",
    "writing.py": "models/writer.py",
}
# Old words that still occur.
STILL_THERE: set[str] = set()


@cache
def lines(pages: bool) -> list[tuple[str, str]]:
    """(where, line) of the code, or of the pages."""
    paths = [ROOT / page for page in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    paths = paths if pages else sorted((ROOT / "src").rglob("*.py"))
    return [
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]


def occurrences(pattern: str, pages: bool) -> list[str]:
    return [where for where, line in lines(pages) if re.search(pattern, line)]


def check(word: str, found: list[str], instead: str) -> None:
    if word in STILL_THERE:
        pytest.skip(f"{word} occurs still, {len(found)} times")
    assert not found, f"{word}: say {instead}"


@pytest.mark.parametrize("word", NAMES)
def test_old_names_are_gone(word):
    found = occurrences(rf"\b{word}\b", pages=False) + occurrences(rf"`[^`]*\b{word}\b[^`]*`", pages=True)
    check(word, found, NAMES[word])


@pytest.mark.parametrize("word", FUNCTIONS)
def test_old_functions_are_gone(word):
    check(word, occurrences(rf"\bdef {word}\(", pages=False), FUNCTIONS[word])


@pytest.mark.parametrize("word", MODULES)
def test_pages_name_no_old_module(word):
    pattern = rf"(?<![\w/]){re.escape(word)}"
    check(word, occurrences(pattern, pages=True) + occurrences(pattern, pages=False), MODULES[word])


def test_nothing_is_excused_that_is_gone():
    assert set(NAMES) | set(FUNCTIONS) | set(MODULES) >= STILL_THERE
