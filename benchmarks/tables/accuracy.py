"""Tables of accuracy: the suites, the summary for the project's README, and how the method came about."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks import RESULTS
from benchmarks.accuracy.ablation import STEPS
from benchmarks.accuracy.crossed import CHOSEN_ON, chosen
from benchmarks.accuracy.merges import BASELINE, FULL, METHODS
from benchmarks.accuracy.storage import SETS
from benchmarks.records import read_rows
from benchmarks.tables.markdown import SUITES, TITLES, grid, measured, metric, percent, score, table, used
from epmq.reporting.scores import gap_recovered

# Headings of rows of `benchmarks.accuracy.storage`.
HEADS = {"16": "tables as they are", "8": "8 bits", "4": "4 bits, g32"}
NAMES = {"accuracy": "mean accuracy", "exact_match": "mean exact match", "log_perplexity": "perplexity"}


def suite_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a model, mean and tasks across."""
    tasks = list(rows[0][metric(rows[0])])
    head = ["model", "weights", NAMES[metric(rows[0])], "gap recovered", *tasks, "MB", "s", "peak MB"]
    lines = []
    for row in rows:
        title = row["merge"] if row["merge"] in ("base", "experts") else f"{row['merge']}, {TITLES[row['method']]}"
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        numbers = [score(row, row["mean"]), percent(row["gap_recovered"], 0)]
        numbers += [score(row, row[metric(row)][task]) for task in tasks]
        cost = [size, "–" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        cost.append("–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}")
        lines.append([title, grid(row), *numbers, *cost])
    return table(head, lines)


def written(rows: list[dict[str, Any]]) -> str:
    """What the 4-bit checkpoints of a language model wrote when read back, greedily, a prompt a task."""
    lines = []
    for row in rows:
        if row.get("written") and row["bits"] == 4 and row["method"] in ("gptq", "expert_guided"):
            lines.append(f"\nWritten greedily by the reloaded {TITLES[row['method']]} checkpoint ({grid(row)}):\n")
            lines += [f"* {task}: `{' ⏎ '.join(text.strip().splitlines())}`" for task, text in row["written"].items()]
    if lines:
        lines.append("")  # ends the list
    return "\n".join(lines)


def suite_section(rows: list[dict[str, Any]]) -> str:
    """A suite's table with a line on where and when it was measured."""
    last = rows[-1]
    where = f"{last['hardware']['machine']}, {last['hardware']['threads']} thread(s)"
    note = f"Measured {rows[0]['date'][:10]} to {last['date'][:10]} on {where}; seed {last['seed']}; {used(last)}."
    return "\n".join([suite_table(rows), written(rows), note])


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: suites down, steps across, mean ± standard deviation over the calibration draws."""
    steps = [step for step in STEPS[True] | STEPS[False] if any(row["step"] == step for row in rows)]
    lines = []
    for suite in [suite for suite in SUITES if any(row["suite"] == suite for row in rows)]:
        runs = {step: [row for row in rows if (row["suite"], row["step"]) == (suite, step)] for step in steps}
        draws = {str(len(of_step)) for of_step in runs.values() if of_step}
        lines.append([suite, " to ".join(sorted(draws)), *map(spread, runs.values())])
        lines.append(["processor time", "", *(cost(of_step, runs["GPTQ"]) for of_step in runs.values())])
    return "\n".join([table(["suite", "draws", *steps], lines), "", measured(rows)])


def spread(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of the scores of some runs."""
    if not runs:
        return "–"
    values = [math.exp(run["mean"]) if metric(run) == "log_perplexity" else 100 * run["mean"] for run in runs]
    digits = 2 if metric(runs[0]) == "log_perplexity" else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def cost(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """Processor time of some runs, over that of plain GPTQ on the same draws."""

    def spent(run: dict[str, Any]) -> float:
        return run["cpu_seconds"]["open"] + run["cpu_seconds"]["merge and quantize"]

    base = {run["seed"]: spent(run) for run in plain}
    ratios = [spent(run) / base[run["seed"]] for run in runs if run["seed"] in base]
    return f"{statistics.mean(ratios):.1f}×" if ratios else "–"


def suite_rows(suite: str, method: str) -> tuple[dict[str, Any], float, float]:
    """A method's row at 4 bits, one scale a row, by Task Arithmetic; the means of GPTQ there and of the experts."""
    rows = read_rows(RESULTS / f"{suite}.json")
    same = {"merge": "task_arithmetic", "bits": 4, "group_size": -1}
    by_method = {row["method"]: row for row in rows if same.items() <= row.items()}
    return by_method[method], by_method["gptq"]["mean"], next(row["mean"] for row in rows if row["merge"] == "experts")


def merges_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a suite and merge: scores over the draws, the gap recovered, seconds and peak memory."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    head = ["suite", "merge", "draws"]
    head += [cell for method in methods for cell in (method, "gap recovered", "s", "peak MB")]
    lines = []
    for suite in SUITES:
        ours = [row for row in rows if row["suite"] == suite]
        for merge in dict.fromkeys(row["merge"] for row in ours):
            runs = {name: [row for row in ours if (row["merge"], row["method"]) == (merge, name)] for name in methods}
            draws = " to ".join(sorted({str(len(of_method)) for of_method in runs.values() if of_method}))
            cells = (cell for of_method in runs.values() for cell in merge_cells(of_method, ours))
            lines.append([f"{suite}, {short_name(ours[0])}", merge, draws, *cells])
    return "\n".join([table(head, lines), "", measured(rows)])


def merge_cells(runs: list[dict[str, Any]], suite: list[dict[str, Any]]) -> list[str]:
    """Scores of some runs of `benchmarks.accuracy.merges`, the gap that they recover on the same draws, and cost."""
    if not runs:
        return ["–"] * 4
    means = {(row["merge"], row["method"], row["seed"]): row["mean"] for row in suite}
    gaps = []
    for run in runs:
        start, end = means.get((*BASELINE, run["seed"])), means.get(("experts", FULL, run["seed"]))
        gap = None if start is None or end is None else gap_recovered(run["mean"], start, end)
        gaps += [] if gap is None or run["merge"] == "experts" else [gap]
    costs = [
        f"{statistics.mean(run[name] for run in runs):.0f}" if runs[0][name] is not None else "–"
        for name in ("seconds", "peak_memory_mb")
    ]
    return [spread(runs), f"{percent(statistics.mean(gaps), 0)} %" if gaps else "–", *costs]


def crossed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a suite, with the settings that the validation data of other tasks choose."""
    head = ["suite", "chosen on", "anchor strength, scale", "features", "score", "gap recovered", "the default's"]
    lines = []
    for suite, other in CHOSEN_ON.items():
        ours, gptq, experts = suite_rows(suite, "expert_guided")
        settings = chosen(suite)
        row = next((row for row in [ours, *rows] if row["suite"] == suite and row["settings"] == settings), None)
        if row is None:  # chosen otherwise than the default, and not measured
            continue
        cells = [suite, other, f"{settings['anchor_strength']:g}, {settings['anchor_scale']:g}"]
        cells += [f"{settings['expert_features']:g}", score(row, row["mean"])]
        lines.append([*cells, *(percent(gap_recovered(run["mean"], gptq, experts), 0) for run in (row, ours))])
    return "\n".join([table(head, lines), "", measured(rows)])


def limits_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a run of `limits`; the gap is that to GPTQ at 4 bits in the suite's table."""
    head = ["suite", "examples a task", "weights", "score", "gap recovered", "s, processor"]
    lines = []
    for row in sorted(rows, key=lambda row: (SUITES.index(row["suite"]), row["samples"], row["bits"])):
        _, gptq, experts = suite_rows(row["suite"], "gptq")
        gap, seconds = gap_recovered(row["mean"], gptq, experts), row["cpu_seconds"]["merge and quantize"]
        cells = [row["suite"], f"{row['samples']}", grid({**row, "symmetric": True})]
        lines.append([*cells, score(row, row["mean"]), percent(gap, 0), f"{seconds:.0f}"])
    return "\n".join([table(head, lines), "", measured(rows)])


def codes_table(results: dict[str, Any]) -> str:
    """Markdown: grids across, a line a way to better codes."""
    head = ["loss over that of GPTQ with searched scales", *(grid(row) for row in results["rows"])]
    ways = results["rows"][0]["loss"]
    lines = [[way, *(f"{row['loss'][way]:.3f}" for row in results["rows"])] for way in ways]
    return "\n".join([table(head, lines), "", measured([results])])


def storage_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table a set of rows, and when they were measured."""
    tables = [text for name in SETS if (text := storage_table(rows, name))]
    return "\n\n".join([*tables, measured(rows)])


def storage_table(rows: list[dict[str, Any]], name: str) -> str:
    """Markdown: suites down and the rows of a set across: scores over the draws, and the size of the file."""
    head = ["suite", "draws", *(cell for row in SETS[name] for cell in (HEADS.get(row, row), "MB"))]
    lines = []
    for suite in SUITES:
        runs = {one: [row for row in rows if (row["suite"], row["row"]) == (suite, one)] for one in SETS[name]}
        done = [of_row for of_row in runs.values() if of_row]
        if done:
            draws = " to ".join(sorted({str(len(of_row)) for of_row in done}))
            cells = (cell for of_row in runs.values() for cell in (spread(of_row), size(of_row)))
            lines.append([f"{suite}, {short_name(done[0][0])}", draws, *cells])
    return table(head, lines) if lines else ""


def size(runs: list[dict[str, Any]]) -> str:
    """MB of the file of some runs, which have the same layout or limit."""
    return f"{statistics.mean(run['bytes'] for run in runs) / 1e6:.1f}" if runs else "–"


def summary(suites: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown for the project's README: 4 bits, one scale a row, a line for each suite and merge."""
    methods = ("none", "rtn", "gptq", "e_pmq", "expert_guided")
    head = ["suite, merge", *("merged" if m == "none" else TITLES[m] for m in methods), "experts", "gap recovered"]
    lines = []
    for suite, rows in suites.items():
        experts = next(score(row, row["mean"]) for row in rows if row["merge"] == "experts")
        for merge in dict.fromkeys(row["merge"] for row in rows if row["method"] == "gptq"):
            runs = {row["method"]: row for row in rows if row["merge"] == merge and row["bits"] in (None, 4)}
            if set(methods) <= runs.keys():
                means = [score(runs[method], runs[method]["mean"]) for method in methods]
                gap = f"{percent(runs['expert_guided']['gap_recovered'], 0)} %"
                lines.append([f"{suite}, {merge}, {short_name(rows[0])}", *means, experts, gap])
    return table(head, lines)


def short_name(row: dict[str, Any]) -> str:
    """What a row's scores are, in a word or two."""
    return NAMES[metric(row)].removeprefix("mean ")


def bits_table(suites: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown for docs/choosing.md: widths across, a line a suite and method, merged by Task Arithmetic."""
    merged = [row for rows in suites.values() for row in rows if row["merge"] == "task_arithmetic"]
    grids = list(dict.fromkeys(grid(row) for row in merged if row["bits"]))
    head = ["suite", "merged", "method", *(title for name in grids for title in (name, "MB"))]
    lines = []
    for suite, rows in suites.items():
        ours = [row for row in rows if row["merge"] == "task_arithmetic"]
        full = next(row for row in ours if row["method"] == "none")
        for method in ("gptq", "expert_guided"):
            cells = [f"{suite}, {short_name(full)}", score(full, full["mean"]), TITLES[method]]
            for name in grids:
                same = [row for row in ours if row["method"] == method and grid(row) == name]
                cells += [score(same[0], same[0]["mean"]), f"{same[0]['bytes'] / 1e6:.1f}"] if same else ["–", "–"]
            lines.append(cells)
    return table(head, lines)
