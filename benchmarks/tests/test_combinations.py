"""The campaign of combinations: its results, in portions, and their line in the table."""

import json
from dataclasses import asdict

from benchmarks.faults.combinations import read_log, totals
from benchmarks.tables.faults import _counted
from tests.kit.combinations import Result


def test_portions_add_up_and_a_number_that_was_tried_again_counts_once(tmp_path):
    log = tmp_path / "log.jsonl"
    results = [Result({"number": 0}, "right"), Result({"number": 1}, "silent", "off"), Result({"number": 1}, "right")]
    log.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    counts = totals(read_log(log), seed=0)
    assert (counts["drawn"], counts["right"], counts["silent"], counts["failed"]) == (2, 2, 0, [])


def test_the_table_has_a_line_for_each_campaign_that_counts():
    counts = totals([Result({"number": 0}, "right"), Result({"number": 1}, "crash", "why")], seed=0)
    assert [failure["why"] for failure in counts["failed"]] == ["why"]
    became = "1 right, 0 with a note, 0 refused, 0 could not be made; wrong 1"
    assert _counted("combinations", counts)[1:] == ["2", became]
    identities = {"architectures": 80, "cases": 251, "right": 250, "refused": 1, "wrong": 0}
    assert _counted("identities", identities)[1:] == ["251", "250 the expert itself, 1 refused; wrong 0"]
