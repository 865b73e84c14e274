from typing import Any

from rich.console import Console

from epmq.reporting.comparison import comparison_table, measured, measured_accuracy
from epmq.reporting.scores import score_report

SIZE: dict[str, Any] = {"bytes": 2_500_000, "bits_per_weight": 4.25}


def lines(columns: dict[str, Any]) -> list[list[str]]:
    """The rows of a table as text, cell by cell; the first is its title."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(columns, "4 bits"))
    return [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in capture.get().splitlines()]


def test_accuracies_are_in_percent_with_their_mean_and_the_size() -> None:
    rows = lines({"a": measured_accuracy({"x": 0.5, "y": 0.75}, **SIZE), "b": measured_accuracy({"x": 1.0}, **SIZE)})
    assert rows[0] == ["accuracy in %, 4 bits"]
    expected = [["x", "50.0", "100.0"], ["y", "75.0", "–"], ["mean", "62.5", "100.0"], ["MB", "2.5", "2.5"]]
    assert all(row in rows for row in [*expected, ["bits a weight", "4.2", "4.2"]])


def test_tasks_of_several_metrics_name_them() -> None:
    scores = score_report({"x": "accuracy", "y": "pearson"}, {"x": 0.5, "y": 0.25})
    rows = lines({"a": measured({**scores, "bytes": 1_000_000, "bits_per_weight": None})})
    assert rows[0] == ["score, 4 bits"]
    assert all(row in rows for row in [["x", "50.0 % accuracy"], ["mean", "37.5"], ["bits a weight", "–"]])
