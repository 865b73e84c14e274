"""Runs as a page compares them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import EXPERTS, RUNS, made

from epmq.files import write_json
from epmq.reporting.runs import Run, Scores, gap, labels, read_experts, read_runs, reference
from epmq.reporting.scores import gap_recovered

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_gap_is_taken_from_gptq_on_the_same_grid():
    assert reference(RUNS[2], RUNS, "gptq") is RUNS[1]
    assert reference(RUNS[2], RUNS, "none") is RUNS[0]
    assert gap(RUNS[2], RUNS, EXPERTS) == pytest.approx(gap_recovered(0.7, 0.5, 0.9))
    assert gap(RUNS[2], RUNS, None) is None
    assert gap(made("expert_guided", 0.7, merge="ties"), RUNS, EXPERTS) is None


def test_names_tell_runs_apart():
    assert labels(RUNS) == ["merged", "GPTQ, 4 bits", "expert-guided, 4 bits", "GPTQ, 2 bits"]
    assert labels([made("gptq", 0.5), made("gptq", 0.6, merge="ties")]) == ["task_arithmetic, GPTQ", "ties, GPTQ"]
    assert len(set(labels([made("gptq", 0.5), Run(**{**vars(made("gptq", 0.6)), "name": "other"})]))) == 2


def test_tasks_of_several_metrics_are_shown_each_in_its_own():
    mixed = replace(RUNS[0], metric=None, metrics={"one": "log_perplexity", "two": "mse"}, mean=None)
    assert mixed.show(0.0, "one") == "1.00" and mixed.show(2.5, "two") == "2.5" and mixed.show(None) == "–"
    shares = replace(RUNS[0], metric=None, metrics={"one": "f1", "two": "pearson"})
    assert (shares.show(0.5, "one"), shares.show(0.5, "two"), shares.show(0.5)) == ("50.0 %", "50.0", "50.0")
    assert reference(replace(shares, method="gptq"), [shares, mixed], "none") is shares


def test_what_is_no_report_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "report.json"))):
        read_runs([tmp_path])
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_runs([tmp_path])
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not a report of epmq"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="no experts' scores"):
        read_experts(tmp_path / "report.json")


def test_experts_are_read_from_what_eval_prints(tmp_path):
    write_json(tmp_path / "e.json", {"out": {}, "experts": {"scores": {"one": 0.8}, "mean_score": 0.8}})
    assert read_experts(tmp_path / "e.json") == Scores({"one": 0.8}, 0.8)


@pytest.mark.parametrize("suite", ["text8", "causal3"])
def test_gaps_are_those_of_the_benchmarks(suite):
    runs, experts = read_runs([RESULTS / f"{suite}.json"])
    rows = json.loads((RESULTS / f"{suite}.json").read_text())
    expected = [row["gap_recovered"] for row in rows if row["merge"] not in ("base", "experts")]
    gaps = [gap(run, runs, experts) for run in runs]
    assert [v for v in gaps if v is not None] == pytest.approx([v for v in expected if v is not None])


def test_a_refined_run_is_named_and_no_reference():
    plain = RUNS[1]
    refined = replace(plain, report={"recipe": {"quantize": {"refine": "distill"}}})
    assert (plain.title, refined.title) == ("GPTQ", "GPTQ refined")
    assert reference(RUNS[2], [refined, plain], "gptq") is plain
