"""Size, memory and speed of a checkpoint in the runtimes that are installed."""

import shutil

import pytest
from conftest import recipe_for

import epmq
from epmq.files import read_json, write_json
from epmq.pipeline import bench, bench_worker

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, and each run but once."""
    monkeypatch.setattr(bench_worker, "SECONDS", 0)
    monkeypatch.setattr(bench_worker, "FEWEST", 1)

    def run(command, **settings):
        task, answer = command[-2:]
        write_json(bench.Path(answer), bench_worker.measure(read_json(bench.Path(task))))

    monkeypatch.setattr(bench.subprocess, "run", run)
    write, written = bench.onnx.write_graphs, {}

    def write_once(source, folder, level, ending):
        """The two graphs of codes differ in one attribute: one of them serves for both."""
        form = "float32" if level is None else "codes"
        if form not in written:
            written[form] = folder
            return write(source, folder, level, ending)
        shutil.copytree(written[form], folder, dirs_exist_ok=True)
        return sorted(folder.glob("*/*.onnx"))

    monkeypatch.setattr(bench.onnx, "write_graphs", write_once)


def test_every_runtime_is_measured_beside_float32(pool, tmp_path, here):
    out = tmp_path / "out"
    epmq.run(recipe_for(pool, quantize={"method": "rtn"}, output=str(out)), progress=False, evaluate=False)
    rows = epmq.bench(out, progress=False)
    found = [(row["runtime"], row["weights"]) for row in rows if row["runtime"] != "llama.cpp"]
    onnx = [("onnx", "float32"), ("onnx", "codes"), ("onnx-int8", "codes")]
    assert found == [("torch", "float32"), ("torch, packed", "codes"), *onnx]
    assert all(row["latency_ms"] > 0 and row["throughput"] > 0 for row in rows)
    sizes = {pair: row["bytes"] for pair, row in zip(found, rows)}
    assert (
        sizes["onnx", "codes"] < sizes["onnx", "float32"]
        and sizes["torch, packed", "codes"] < sizes["torch", "float32"]
    )
    assert read_json(out / "report.json")["bench"]["rows"] == rows
    assert bench.bench_table(rows).row_count == len(rows)


def test_a_runtime_that_ends_without_an_answer_says_what_it_said(pool, tmp_path, monkeypatch):
    out = tmp_path / "out"
    epmq.run(recipe_for(pool, quantize={"method": "rtn"}, output=str(out)), progress=False, evaluate=False)
    monkeypatch.setattr(bench, "_writers", lambda source: iter(()))
    monkeypatch.setattr(bench.sys, "executable", "false")
    with pytest.raises(epmq.errors.EnvironmentFault, match="torch, float32: ended without an answer"):
        epmq.bench(out, progress=False)
