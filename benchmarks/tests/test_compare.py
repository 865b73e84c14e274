import importlib
import json
import math

import pytest

from benchmarks.accuracy import compare
from benchmarks.suites.__main__ import SUITES
from benchmarks.tables.__main__ import main, replace_section
from benchmarks.tables.accuracy import suite_table


def made_row(merge, method, mean, bits=4):
    quantize = {"method": method, "bits": bits, "group_size": -1, "symmetric": True}
    cost = {"seed": 0, "seconds": 1.0, "peak_memory_mb": 100.0, "bytes": 1_000_000}
    report = {"metric": "accuracy", "scores": {"one": mean - 0.1, "two": mean + 0.1}, "mean_score": mean}
    return compare.row("text8", merge, quantize, report, **cost)


@pytest.fixture
def rows():
    rows = [
        made_row("experts", "none", 0.9),
        made_row("ties", "gptq", 0.5),
        made_row("ties", "gptq", 0.3, bits=2),
        made_row("ties", "expert_guided", 0.8),
        made_row("ties", "expert_guided", 0.6, bits=2),
        made_row("task_arithmetic", "expert_guided", 0.8),
    ]
    compare.add_gaps(rows)
    return rows


def test_gaps_are_taken_against_gptq_on_the_same_merge_and_grid(rows):
    gaps = [row["gap_recovered"] for row in rows]
    assert gaps[0] is None and gaps[5] is None
    assert gaps[1:5] == pytest.approx([0, 0, 0.75, 0.5])


def test_rows_have_every_field(rows):
    fields = "suite merge method bits group_size symmetric accuracy mean gap_recovered seconds peak_memory_mb seed"
    for row in rows:
        assert set([*fields.split(), "versions", "date", "hardware"]) <= row.keys()
    assert rows[0]["bits"] is None and rows[1]["bits"] == 4


def test_every_row_of_the_comparison_is_asked_for_once():
    # Two merges at three widths; of language models, the first at two.
    for suite, count in (("text8", 2 * (1 + 3 * 3 + 1)), ("vision8", 2 * (1 + 3 * 3 + 1)), ("causal3", 1 + 2 * 3 + 1)):
        module = importlib.import_module(f"benchmarks.suites.{suite}")
        rows = [json.dumps([merge, quantize], sort_keys=True) for merge, quantize in compare.settings(module)]
        assert len(rows) == len(set(rows)) == count
    assert set(compare.SAMPLES) == set(SUITES)


def test_the_table_says_what_the_rows_say(rows):
    lines = suite_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| ties, expert-guided | 4 bits, a row | 80.0 | 75 | 70.0 | 90.0 | 1.0 | 1 | 100 |" in lines


def test_perplexities_are_shown_as_such():
    report = {"metric": "log_perplexity", "scores": {"one": 0.0, "two": math.log(4)}, "mean_score": math.log(2)}
    row = compare.row("causal3", "experts", {"method": "none"}, report, seed=0, seconds=None, peak_memory_mb=None)
    table = suite_table([row | {"bytes": None, "gap_recovered": None}])
    assert "| perplexity |" in table and "| experts | – | 2.00 | – | 1.00 | 4.00 |" in table


def test_sections_are_replaced_and_missing_ones_named():
    text = "a\n<!-- s -->\nold\n<!-- end s -->\nb\n"
    assert replace_section(text, "s", "new") == "a\n<!-- s -->\nnew\n<!-- end s -->\nb\n"
    with pytest.raises(ValueError, match="no section '<!-- t -->'"):
        replace_section(text, "t", "new")


def test_the_committed_tables_are_made_from_the_committed_results(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
