"""Whole tables on a folder that looks like the Hub; nothing is fetched, and nothing in the recipes knows."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from epmq.cli import app
from epmq.reproduce import run as loop
from epmq.reproduce.run import reproduce
from epmq.reproduce.tables import RunOptions, load_table
from tests.kit.mirror import build


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of all that CLIP's table for ViT-B/32 names."""
    folder = tmp_path_factory.mktemp("hub")
    build(load_table("clip-vit-b32-8"), folder)
    return folder


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("something asked the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "220"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.slow
def test_a_table_of_clip_models(hub, tmp_path):
    picked = ["--merge", "task_arithmetic", "--bits", 4]
    printed = call("clip-vit-b32-8", "--hub", hub, "-o", tmp_path / "out", "--quiet", *picked).output
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["row"]: row for row in content["rows"]}
    methods = ("rtn", "gptq", "gptq+heads", "e_pmq", "expert_guided")
    ours = ["base", "experts", "task_arithmetic", *(f"task_arithmetic-{method}-4" for method in methods)]
    assert [name for name, row in rows.items() if "mean" in row] == ours
    # The pictures' labels are what transformers' own CLIPModel makes of them with the expert's vision tower, but for
    # every fourth: scores below that would mean that a head or a tower is another one.
    assert all(75 <= score < 100 for score in rows["experts"]["scores"].values())
    assert rows["base"]["mean"] < rows["experts"]["mean"]
    assert rows["experts"]["mean"] == pytest.approx(sum(rows["experts"]["scores"].values()) / 8, abs=1e-3)
    four, whole = rows["task_arithmetic-gptq-4"], rows["task_arithmetic"]
    assert four["bytes"] < whole["bytes"] and four["peak_memory_mb"] > 0 and four["seconds"]["evaluate"] > 0
    assert rows["task_arithmetic-e_pmq-4"]["published_mean"] == 73.6 and four["published_mean"] == 65.0
    assert rows["task_arithmetic-e_pmq-4"]["published_gap_recovered"] == pytest.approx((73.6 - 65.0) / (90.3 - 65.0))
    gap = (rows["task_arithmetic-rtn-4"]["mean"] - four["mean"]) / (rows["experts"]["mean"] - four["mean"])
    assert rows["task_arithmetic-rtn-4"]["gap_recovered"] == pytest.approx(gap)
    assert rows["regmean"] == {**rows["regmean"], "published_mean": 82.4, "gap_recovered": None}
    # Each run's own report; no checkpoint unless it is asked for.
    reports = {file.stem for file in (tmp_path / "out" / "reports").iterdir()}
    assert reports == set(ours) - {"base", "experts"} and not (tmp_path / "out" / "checkpoints").exists()
    followed = json.loads((tmp_path / "out" / "reports" / "task_arithmetic-gptq+heads-4.json").read_text())
    assert set(followed["heads"]) == set(content["tasks"])
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "73.6 %" in shown and "gptq+heads" in shown and "Size against score" in shown and "gap recovered" in shown
    text = (tmp_path / "out" / "table.md").read_text()
    for shown in (text, printed):
        assert "73.6" in shown and "34 %" in shown and "expert_guided" in shown and "svhn" in shown
    assert "arXiv 2605.16882" in text and "quick look" not in text


@pytest.mark.slow
def test_a_table_that_was_stopped_goes_on(hub, tmp_path, monkeypatch):
    out, picked = tmp_path / "out", ["--merge", "ties", "--method", "rtn", "--method", "gptq", "--bits", 8]
    again = ["clip-vit-b32-8", "--hub", hub, "-o", out, "--quiet", *picked, "--limit", 4]
    original, runs = loop.run, list[str]()

    def run(recipe: Any, **settings: Any) -> Any:
        runs.append(Path(recipe.output).name)
        if len(runs) == 2:
            raise RuntimeError("stopped")
        return original(recipe, **settings)

    monkeypatch.setattr(loop, "run", run)
    with pytest.raises(RuntimeError, match="stopped"):
        call(*again)
    before = json.loads((out / "table.json").read_text())["rows"]
    with pytest.raises(FileExistsError, match=r"table\.json exists already: go on with --resume"):
        call(*again)
    with pytest.raises(ValueError, match=r"was made otherwise \(limit: 4 → 5\)"):
        call(*again[:-1], 5, "--resume")
    call(*again, "--resume", "--keep")
    assert runs == ["ties", "ties-rtn-8", "ties-rtn-8", "ties-gptq-8"]
    content = json.loads((out / "table.json").read_text())
    after = {row["row"]: row for row in content["rows"]}
    assert [name for name, row in after.items() if "mean" in row] == ["base", "experts", "ties", *runs[2:]]
    finished = [row for row in before if "mean" in row]
    assert len(finished) == 3 and all(after[row["row"]]["seconds"] == row["seconds"] for row in finished)
    assert (out / "checkpoints" / "ties-gptq-8" / "config.json").exists()
    assert "At most 4 examples a task" in (out / "table.md").read_text()

    # A run that was stopped between its checkpoint and its row: the checkpoint is there, and is not made again.
    rows = [row for row in content["rows"] if row["row"] != "ties-gptq-8"]
    (out / "table.json").write_text(json.dumps({**content, "rows": rows}))
    call(*again, "--resume")
    assert len(runs) == 4 and not (out / "checkpoints" / "ties-gptq-8").exists()
    assert {row["row"]: row for row in json.loads((out / "table.json").read_text())["rows"]} == after


def test_rows_are_picked_by_name():
    table = load_table("clip-vit-b32-8")
    names = [row.name for row in RunOptions(["ties"], ["e_pmq"], [3, 4]).rows(table)]
    assert names == ["base", "experts", "ties", "ties-e_pmq-4", "ties-e_pmq-3"]
    # Base and experts; seven merges; five of them with all quantizers, RegMean with none, RegMean++ with two GPTQs.
    assert len(RunOptions().rows(table)) == 2 + 7 + (5 * 5 + 2) * 4
    for field, value in (("merges", "slerp"), ("methods", "awq"), ("bits", 5)):
        with pytest.raises(ValueError, match=f"the table has no {value}; it has "):
            RunOptions(**{field: [value]}).rows(table)


def test_tables_are_listed():
    printed = call("--list").output
    assert "clip-vit-b32-8" in printed and "CLIP-ViT-B/32, eight image tasks" in printed
    assert call().output == printed
    with pytest.raises(FileNotFoundError, match=r"clip: no such table; there are .*clip-vit-b32-8"):
        call("clip")


def test_what_is_nowhere_is_named(hub, tmp_path):
    with pytest.raises(AssertionError, match="something asked the Hub"):
        reproduce("clip-vit-b32-8", tmp_path / "out", RunOptions(hub=tmp_path), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tasks", "published"),
    [
        pytest.param("clip-vit-l14-20", 20, {"experts": 93.5}, marks=pytest.mark.rare),
        ("flan-t5-base-glue", 8, {"task_arithmetic-gptq-4": 78.26}),
    ],
)
def test_the_other_tables_run_too(tmp_path, name, tasks, published):
    table = load_table(name)
    build(table, tmp_path / "hub")
    options = RunOptions(["task_arithmetic"], ["gptq"], [4], limit=4, hub=tmp_path / "hub")
    content = reproduce(name, tmp_path / "out", options, progress=False)
    rows = {row["row"]: row for row in content["rows"]}
    ours = [row for row in rows.values() if "mean" in row]
    assert len(ours) == 4 and all(len(row["scores"]) == tasks for row in ours)
    for row in ours:
        assert row["mean"] == pytest.approx(sum(row["scores"].values()) / tasks, abs=1e-3)
    assert {row: rows[row]["published_mean"] for row in published} == published
    metrics = rows["experts"]["metric"]
    if name.startswith("flan"):
        assert metrics == {task: "spearman" if task == "stsb" else "exact_match" for task in table.tasks}
    else:
        assert metrics == "accuracy"


@pytest.mark.slow
@pytest.mark.rare
def test_a_table_that_lm_eval_scores(tmp_path):
    table = load_table("llama-mergebench")
    build(table, tmp_path / "hub", rows=24)
    options = RunOptions(["task_arithmetic"], ["expert_guided"], [4], limit=2, hub=tmp_path / "hub")
    content = reproduce(table, tmp_path / "out", options, progress=False)
    rows = {row["row"]: row for row in content["rows"]}
    ours = [name for name, row in rows.items() if "mean" in row]
    assert ours == ["base", "experts", "task_arithmetic", "task_arithmetic-expert_guided-4"]
    for name in ours:
        scores = rows[name]["scores"]
        assert list(scores) == ["math", "multilingual", "instruction"] and rows[name]["metric"] == "lm-eval"
        assert scores["multilingual"] * 24 / 100 == pytest.approx(round(scores["multilingual"] * 24 / 100), abs=1e-3)
        assert rows[name]["mean"] == pytest.approx(sum(scores.values()) / 3, abs=1e-3)
    assert rows[ours[3]]["bytes"] < rows[ours[2]]["bytes"]
    assert rows["regmean++ofallfiveexperts"]["published_mean"] == 31.43
