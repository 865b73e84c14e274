"""What all tables share: lines of Markdown, scores, grids, and what rows were measured with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

SUITES = ("vision8", "text8", "text8lora", "causal3", "seq2seq")
TITLES = {"none": "full precision", "rtn": "RTN", "gptq": "GPTQ", "e_pmq": "E-PMQ", "expert_guided": "expert-guided"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [line(head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *map(line, rows)])


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def metric(row: dict[str, Any]) -> str:
    """What a row's scores are; the first results were all accuracies and do not say so."""
    return row.get("metric", "accuracy")


def score(row: dict[str, Any], value: float) -> str:
    """A score as the tables show it: percent, or a perplexity."""
    return f"{math.exp(value):.2f}" if metric(row) == "log_perplexity" else percent(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    if value is None:
        return "–"
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def grid(row: dict[str, Any]) -> str:
    """Bits and groups of a row, in words."""
    if row["bits"] is None:
        return "–"
    groups = "a row" if row["group_size"] == -1 else f"g{row['group_size']}"
    return f"{row['bits']} bits, {groups}" + ("" if row["symmetric"] else ", asymmetric")


def measured(rows: list[dict[str, Any]]) -> str:
    """When the last of some rows was measured, and with what."""
    last = max(rows, key=lambda row: row["date"])
    return f"Measured until {last['date'][:10]} on {last['hardware']['machine']}; {used(last)}."


def used(row: dict[str, Any]) -> str:
    """The versions that a row was measured with."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())
