"""Rows of a table beside what was published."""

import pytest

from epmq.reproduce.results import MOST_TASKS, cells, markdown, row_result, terminal_table, with_published
from epmq.reproduce.tables import Row, Table

TASK = {"data": {"dataset": "owner/pets"}, "classes": ["cat", "dog"], "templates": ["a {}"]}


def figure(method, mean, merge="ta", bits=4, **fields):
    return {"method": method, "mean": mean, "merge": merge, "bits": bits, "source": "a paper", **fields}


TABLE = Table.model_validate(
    {
        "title": "two tasks",
        "base": "owner/base",
        "experts": "owner/expert_{task}",
        "tasks": {"one": TASK, "two": TASK},
        "merges": {"ta": {}},
        "methods": {"gptq": {"method": "gptq"}, "ours": {"method": "expert_guided"}},
        "shapes": {"base": {"model": "CLIPModel", "config": {}}},
        "published": [
            figure("experts", 90.0, None, None),
            figure("gptq", 60.0),
            figure("ours", 75.0),
            figure("none", 70.0, "regmean", None),
        ],
    }
)


def result(row, mean):
    report = {
        "metric": "accuracy",
        "scores": {"one": mean - 0.1, "two": mean + 0.1},
        "mean_score": mean,
        "seconds": {"merge and quantize": 2.0, "evaluate": 1.0},
        "date": "today",
    }
    return row_result(TABLE, row, report | ({"bytes": 2_000_000, "bits_per_weight": 4.5} if row.bits else {}))


RESULTS = [
    result(Row(None, "experts", None), 0.8),
    result(Row("ta", "gptq", 4), 0.5),
    result(Row("ta", "ours", 4), 0.7),
]


def test_a_row_holds_scores_of_a_hundred():
    row = RESULTS[1]
    assert row["row"] == "ta-gptq-4" and row["mean"] == 50 and row["scores"] == {"one": 40, "two": 60}
    assert row["group_size"] == -1 and (row["bytes"], row["bits_per_weight"]) == (2_000_000, 4.5) and row["notes"] == []
    assert RESULTS[0]["group_size"] is None and RESULTS[0]["bytes"] is None


def test_rows_are_in_the_tables_order_with_what_was_published():
    rows = {row["row"]: row for row in with_published(TABLE, RESULTS[::-1])}
    assert list(rows) == ["experts", "ta-gptq-4", "ta-ours-4", "regmean"]
    assert [row["published_mean"] for row in rows.values()] == [90, 60, 75, 70]
    assert rows["ta-ours-4"]["gap_recovered"] == pytest.approx((70 - 50) / (80 - 50))
    assert rows["ta-ours-4"]["published_gap_recovered"] == pytest.approx((75 - 60) / (90 - 60))
    assert rows["ta-gptq-4"]["gap_recovered"] is None and rows["regmean"]["gap_recovered"] is None
    assert "mean" not in rows["regmean"] and rows["regmean"]["published"][0]["source"] == "a paper"


def content(**fields):
    rows = with_published(TABLE, RESULTS)
    about = {"title": TABLE.title, "limit": None, "versions": {"epmq": "1"}, "date": "today", "hardware": {}}
    return {"rows": rows, "tasks": ["one", "two"], **about, **fields}


def test_a_table_shows_every_row_and_task():
    headings, lines = cells(content()["rows"], ["one", "two"])
    assert {"one", "two"} <= set(headings) and all(len(line) == len(headings) for line in lines)
    text = markdown(content())
    assert text.startswith("# two tasks\n") and "67 %" in text and "* published: a paper" in text
    assert "At most" not in text and "At most 5 examples a task" in markdown(content(limit=5))


def test_the_terminal_leaves_tasks_out_where_there_are_too_many():
    names = [column.header for column in terminal_table(content()).columns]
    assert {"one", "two"} <= set(names)
    tasks = [f"task {number}" for number in range(MOST_TASKS + 1)]
    few = [column.header for column in terminal_table(content(tasks=tasks)).columns]
    assert not set(tasks) & set(few) and len(few) == len(names) - 2
