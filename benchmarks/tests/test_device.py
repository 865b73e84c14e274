"""The script for accelerators, on the processor: a quick form of what it measures, and its tables."""

import json
from dataclasses import replace

import pytest

from benchmarks import RESULTS
from benchmarks.speed import device, device_runs
from benchmarks.tables.speed import device_table


@pytest.fixture
def job(tmp_path, monkeypatch) -> device.Job:
    monkeypatch.setattr(device, "LAYERS", ((64, 256),))
    small = replace(device_runs.SMALL, layers=1, samples=2, tokens=8)
    for module in (device, device_runs):
        monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(device, "METHODS", ("gptq",))
    return device.Job("cpu", tmp_path, quick=True)


@pytest.mark.slow
def test_every_stage_leaves_rows_and_tables(job, monkeypatch, capsys):
    for stage in ("rates", "solver", "equality", "llama-1b"):
        device.STAGES[stage](job)
    results = json.loads((job.out / device.FILE).read_text())
    (layer,), (same,), (run,) = (results[name] for name in ("solver", "equality", "runs"))
    assert layer["name"] == "64 × 256" and layer["error"] > 0
    assert same["equal_codes"] == 1 and same["changed_files"] == [] and same["within_one_percent"] == same["layers"]
    assert run["name"] == "llama-1b, gptq" and run["phases"].keys() >= {"forward", "moments", "solve", "to the device"}
    text = device_table(results)
    assert "| 64 × 256 |" in text and "| llama-1b, gptq |" in text and "float32" in text


def test_a_row_that_fails_says_why_and_takes_the_place_of_the_last(job):
    for reason in ("first", "second"):
        job.put("solver", job.tried("row", lambda reason=reason: {}[reason]), key="name")
    results = json.loads((job.out / device.FILE).read_text())
    assert [row["failed"] for row in results["solver"]] == ["KeyError: 'second'"]
    assert "Failed: row (KeyError: 'second')" in device_table(results)


def test_operations_are_those_of_the_published_count():
    """The table of operations in the benchmarks' README: 8192 tokens, width 1024, three experts, in 10⁹."""
    groups = {
        "q": ((1024, 1024), ("q", "k", "v"), False),
        "o": ((1024, 1024), ("o",), True),
        "gate": ((2816, 1024), ("gate", "up"), False),
        "down": ((1024, 2816), ("down",), True),
    }
    rows = [
        {"name": f"model.layers.0.{name}", "shape": list(shape), "group": group, "tokens": 8192, "aims": aims}
        for group, (shape, names, aims) in groups.items()
        for name in names
    ]
    plain, guided = (sum(device_runs.count_operations(rows, 3, kind).values()) / 1e9 for kind in (False, True))
    assert (plain, guided) == pytest.approx((328, 766), abs=1)


def test_the_script_names_stages_that_there_are():
    script = (RESULTS.parent / "device.sh").read_text()
    stages = [line.split()[1] for line in script.splitlines() if line.startswith("stage ")]
    limits = [int(line.split()[2]) for line in script.splitlines() if line.startswith("stage ")]
    assert set(stages) <= device.STAGES.keys() and sum(limits) < 600


def test_outcomes_are_read_from_what_workers_write():
    lines = (
        "[gw1] [ 50%] PASSED tests/a.py::test_one[cuda-x]",
        "tests/a.py::test_two FAILED [100%]",
        "FAILED tests/a.py",
    )
    log = "\n".join(lines)
    assert device.outcomes_of(log) == {"test_one[cuda-x]": "PASSED", "test_two": "FAILED"}
