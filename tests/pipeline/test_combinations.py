"""A short version of `python -m benchmarks.faults.combinations`, and whether its judge notices what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.combination_faults import Happened, edit_weights
from tests.kit.combination_files import write_files
from tests.kit.combination_oracle import Wrong, judge
from tests.kit.combinations import BAD, Combination, Result, attempt, campaign, draw, run_files

PLAIN = Combination(
    number=1,
    architecture="bert",
    heads=("sequence",),
    adapters=(False,),
    tied=(None, None),
    data="texts",
    evaluates=True,
    quantize={"method": "none"},
    form="dequantized",
    scaling=1.0,
)


@pytest.mark.slow
def test_no_combination_ends_wrong_unseen():
    log = list[Result]()
    counts = campaign(range(40), seed=1, log=log)
    failed = {result.combination["number"]: (result.outcome, result.why) for result in log if result.outcome in BAD}
    assert failed == {}
    assert counts["right"] > 10


def test_a_number_is_always_the_same_combination():
    assert draw(7, seed=3) == draw(7, seed=3)
    assert [draw(number) for number in range(20)] != [draw(number, seed=1) for number in range(20)]


@pytest.mark.parametrize("method", ["none", "gptq"])
def test_a_plain_combination_is_right(method, tmp_path):
    quantize = {"method": method, **({"bits": 8} if method != "none" else {})}
    assert attempt(replace(PLAIN, quantize=quantize), tmp_path).outcome == "right"


def test_the_judge_notices_another_tensor(tmp_path):
    files = write_files(PLAIN, tmp_path)
    report, _ = run_files(files)
    assert not judge(files, report, Happened())
    name = "embeddings.LayerNorm.bias"
    edit_weights(Path(report["output"]), lambda tensors: tensors | {name: tensors[name] + 0.1})
    with pytest.raises(Wrong, match=r"embeddings\.LayerNorm\.bias"):
        judge(files, report, Happened())


def test_the_judge_notices_another_score_and_a_lost_head(tmp_path):
    files = write_files(PLAIN, tmp_path)
    report, _ = run_files(files)
    with pytest.raises(Wrong, match="the report says"):
        judge(files, {**report, "scores": {"e0": 0.25}}, Happened())
    (Path(report["output"]) / "heads" / "e0.safetensors").unlink()
    with pytest.raises(Wrong, match="head of e0"):
        judge(files, report, Happened())


def test_the_judge_asks_for_a_note_on_what_is_wrong(tmp_path):
    files = write_files(PLAIN, tmp_path)
    report, _ = run_files(files)
    told = {**report, "notes": ["expert e0: stray.weight is left out"]}
    happened = Happened("a stray tensor", "tell", ("stray",))
    assert judge(files, told, happened)
    with pytest.raises(Wrong, match="no note names it"):
        judge(files, {**report, "notes": []}, happened)
    with pytest.raises(Wrong, match="ends well"):
        judge(files, report, Happened("a missing file", "refuse"))


def test_an_error_before_compute_is_refused_or_declined(tmp_path):
    for name, fault, outcome in (("a", "none", "declined"), ("b", "file", "refused")):
        (tmp_path / name).mkdir()
        combination = replace(PLAIN, architecture="nomic", heads=("none",), evaluates=False, fault=fault)
        assert attempt(combination, tmp_path / name).outcome == outcome
