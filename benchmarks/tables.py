"""`python -m benchmarks.tables`: make the tables of READMEs and docs from `benchmarks/results/*.json`."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ablation import STEPS
from benchmarks.crossed import CHOSEN_ON, chosen
from benchmarks.growth import EXPECTED, GROWN, exponent, grown
from benchmarks.whole_run import OWN
from epmq.reporting.scores import gap_recovered

SUITES = ("vision8", "text8", "text8lora", "causal3", "seq2seq")
HERE = Path(__file__).parent
NAMES = {"accuracy": "mean accuracy", "exact_match": "mean exact match", "log_perplexity": "perplexity"}
TITLES = {"none": "full precision", "rtn": "RTN", "gptq": "GPTQ", "e_pmq": "E-PMQ", "expert_guided": "expert-guided"}


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


def suite_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a model, mean and tasks across."""
    tasks = list(rows[0][metric(rows[0])])
    head = ["model", "weights", NAMES[metric(rows[0])], "gap recovered", *tasks, "MB", "s", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        title = row["merge"] if row["merge"] in ("base", "experts") else f"{row['merge']}, {TITLES[row['method']]}"
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        numbers = [score(row, row["mean"]), percent(row["gap_recovered"], 0)]
        numbers += [score(row, row[metric(row)][task]) for task in tasks]
        cost = [size, "–" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        cost.append("–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}")
        lines.append("| " + " | ".join([title, grid(row), *numbers, *cost]) + " |")
    return "\n".join(lines)


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


def suite_section(path: Path) -> str:
    """A suite's table with a line on where and when it was measured."""
    rows = json.loads(path.read_text())
    last = rows[-1]
    where = f"{last['hardware']['machine']}, {last['hardware']['threads']} thread(s)"
    note = f"Measured {rows[0]['date'][:10]} to {last['date'][:10]} on {where}; seed {last['seed']}; {used(last)}."
    return "\n".join([suite_table(rows), written(rows), note])


def measured(rows: list[dict[str, Any]]) -> str:
    """When the last of some rows was measured, and with what."""
    last = max(rows, key=lambda row: row["date"])
    return f"Measured until {last['date'][:10]} on {last['hardware']['machine']}; {used(last)}."


def used(row: dict[str, Any]) -> str:
    """The versions that a row was measured with."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items())


def shapes_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a shape, then what it was measured with."""
    phases = ("check", "merge", "forward", "moments", "targets", "solve", "write")
    head = ["shape", "parameters", "experts", "samples, tokens a task", "GB in", "GB out", "threads", "minutes"]
    head += [f"{phase} %" for phase in phases] + ["peak GB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        total = sum(row["seconds"].values())
        size = [f"{row['parameters'] / 1e6:.0f} M", f"{row['experts']}", f"{row['samples']}, {row['tokens']}"]
        size += [f"{row['input_bytes'] / 1e9:.1f}", f"{row['output_bytes'] / 1e9:.2f}"]
        size += [f"{row['hardware']['threads']}", f"{total / 60:.1f}"]
        shares = [f"{100 * row['seconds'].get(phase, 0) / total:.0f}" for phase in phases]
        lines.append("| " + " | ".join([row["name"], *size, *shares, f"{row['peak_memory_mb'] / 1e3:.1f}"]) + " |")
    return "\n".join([*lines, "", measured(rows)])


def growth_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a run of `benchmarks.growth`, then the exponents beside those that are expected."""
    fields = {"cpu_seconds": "s, processor", "peak_memory_mb": "peak MB", "output_bytes": "output bytes"}
    head = [*GROWN, *(title for field in fields.values() for title in (field, "predicted")), "s, wall"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shown = [str(row[name]) for name in GROWN]
        for field in fields:
            said = row["predicted"][field]
            shown += [f"{row[field]}", f"{said} ({100 * (said / row[field] - 1):+.0f} %)"]
        lines.append("| " + " | ".join([*shown, str(row["seconds"])]) + " |")
    lines += ["", "| grows | s, processor | expected | MB beyond those when all is open | expected |", "|" + 5 * "---|"]
    for name in GROWN:
        found = [f"{exponent(grown(rows, name), name, kind):.2f} | {EXPECTED[kind][name]}" for kind in EXPECTED]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", measured(rows)])


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: suites down, steps across, mean ± standard deviation over the calibration draws."""
    steps = [step for step in STEPS[True] | STEPS[False] if any(row["step"] == step for row in rows)]
    lines = ["| " + " | ".join(["suite", "draws", *steps]) + " |", "|" + "---|" * (2 + len(steps))]
    for suite in [suite for suite in SUITES if any(row["suite"] == suite for row in rows)]:
        found = {step: [row for row in rows if (row["suite"], row["step"]) == (suite, step)] for step in steps}
        draws = {str(len(runs)) for runs in found.values() if runs}
        lines.append("| " + " | ".join([suite, " to ".join(sorted(draws)), *map(spread, found.values())]) + " |")
        times = [cost(runs, found["GPTQ"]) for runs in found.values()]
        lines.append("| " + " | ".join(["processor time", "", *times]) + " |")
    return "\n".join([*lines, "", measured(rows)])


def suite_rows(suite: str, method: str) -> tuple[dict[str, Any], float, float]:
    """A method's row at 4 bits, one scale a row, by Task Arithmetic; the means of GPTQ there and of the experts."""
    rows = json.loads((HERE / "results" / f"{suite}.json").read_text())
    same = {"merge": "task_arithmetic", "bits": 4, "group_size": -1}
    found = {row["method"]: row for row in rows if same.items() <= row.items()}
    return found[method], found["gptq"]["mean"], next(row["mean"] for row in rows if row["merge"] == "experts")


def crossed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a suite, with the settings that the validation data of other tasks choose."""
    head = ["suite", "chosen on", "anchor strength, scale", "features", "score", "gap recovered", "the default's"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for suite, other in CHOSEN_ON.items():
        ours, gptq, experts = suite_rows(suite, "expert_guided")
        settings = chosen(suite)
        row = next((row for row in [ours, *rows] if row["suite"] == suite and row["settings"] == settings), None)
        if row is None:  # chosen otherwise than the default, and not measured
            continue
        shown = [suite, other, f"{settings['anchor_strength']:g}, {settings['anchor_scale']:g}"]
        shown += [f"{settings['expert_features']:g}", score(row, row["mean"])]
        shown += [percent(gap_recovered(found["mean"], gptq, experts), 0) for found in (row, ours)]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", measured(rows)])


def limits_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a run of `benchmarks.limits`; the gap is that to GPTQ at 4 bits in the suite's table."""
    head = ["suite", "examples a task", "weights", "score", "gap recovered", "s, processor"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (SUITES.index(row["suite"]), row["samples"], row["bits"])):
        _, gptq, experts = suite_rows(row["suite"], "gptq")
        gap, seconds = gap_recovered(row["mean"], gptq, experts), row["cpu_seconds"]["merge and quantize"]
        shown = [row["suite"], f"{row['samples']}", grid({**row, "symmetric": True})]
        shown += [score(row, row["mean"]), percent(gap, 0)]
        lines.append("| " + " | ".join([*shown, f"{seconds:.0f}"]) + " |")
    return "\n".join([*lines, "", measured(rows)])


def reproduce_table(found: dict[str, Any]) -> str:
    """Markdown: one line a row of a published table that was run at full size."""
    lines = ["| row | s | phases | peak MB | MB |", "|" + 5 * "---|"]
    for row in found["rows"]:
        phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in row["seconds"].items())
        peak = "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}"
        lines.append(f"| {row['row']} | {sum(row['seconds'].values()):.0f} | {phases} | {peak} | {size} |")
    whole = f"{found['name']}, at most {found['limit']} examples a task: {found['seconds'] / 60:.1f} minutes in all"
    told = f"{whole}, {found['cpu_seconds'] / 60:.1f} of processor time, {found['peak_memory_mb']:.0f} MB at most."
    return "\n".join([*lines, "", told, "", measured([found])])


def codes_table(found: dict[str, Any]) -> str:
    """Markdown: grids across, a line a way to better codes."""
    head = ["loss over that of GPTQ with searched scales", *(grid(row) for row in found["rows"])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for way in found["rows"][0]["loss"]:
        lines.append(f"| {way} | " + " | ".join(f"{row['loss'][way]:.3f}" for row in found["rows"]) + " |")
    return "\n".join([*lines, "", measured([found])])


def solver_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a shape and peer of `benchmarks.solver`."""
    head = ["out × in", "rounds", "ours, s", "over the floor", "at `@`'s rate", "peer", "peer, s", "times ours"]
    head += ["error, ours", "error, peer"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shown = [f"{row['out']} × {row['in']}", f"{row['rounds']}", f"{row['ours_seconds']:.3f}"]
        shown += [f"{row['floor_ratio']:.1f}×", f"{row['torch_floor_ratio']:.1f}×"]
        shown += [row["peer"], f"{row['peer_seconds']:.3f}", f"{row['ratio']:.1f}×"]
        shown += [f"{row['hessian_error_ours']:.5f}", f"{row['hessian_error_peer']:.5f}"]
        lines.append("| " + " | ".join(shown) + " |")
    fast, usual = (max(row[name] for row in rows) for name in ("matmul_gflops", "torch_matmul_gflops"))
    rates = f"10⁹ operations a second in a product of 2048³: {fast:.0f}, by `@` {usual:.0f}."
    return "\n".join([*lines, "", rates, "", measured(rows)])


def whole_run_table(results: dict[str, Any]) -> str:
    """Markdown: one line a tool of `benchmarks.whole_run`."""
    head = ["tool", "s, processor", *(f"over our {one}" for one in OWN), "s", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        shown = [row["tool"], f"{row['cpu_seconds']:.0f}", *(f"{row[f'over {one}']:.2f}×" for one in OWN)]
        lines.append("| " + " | ".join([*shown, f"{row['seconds']:.0f}", f"{row['peak_memory_mb']:.0f}"]) + " |")
    return "\n".join([*lines, "", measured([results])])


def merging_table(found: dict[str, Any]) -> str:
    """Markdown: one line a merge, ours beside mergekit's, then the least that a merge can take."""
    head = ["merge", "CPU s", "mergekit", "ratio", "peak MB", "mergekit", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found["rows"]:
        shown = [row["method"]]
        for name, ratio in (("cpu_seconds", "cpu_ratio"), ("peak_memory_mb", "memory_ratio")):
            shown += [f"{row['ours'][name]:.0f}", f"{row['mergekit'][name]:.0f}", f"{row[ratio]:.1f}×"]
        lines.append("| " + " | ".join(shown) + " |")
    least = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["floor_cpu_seconds"].items())
    return "\n".join([*lines, "", f"CPU seconds without any merging: {least}.", "", measured([found])])


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


def summary(paths: list[Path]) -> str:
    """Markdown for the project's README: 4 bits, one scale a row, a line for each suite and merge."""
    methods = ("none", "rtn", "gptq", "e_pmq", "expert_guided")
    head = ["suite, merge", *("merged" if m == "none" else TITLES[m] for m in methods), "experts", "gap recovered"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in paths:
        rows = json.loads(path.read_text())
        experts = next(score(row, row["mean"]) for row in rows if row["merge"] == "experts")
        for merge in dict.fromkeys(row["merge"] for row in rows if row["method"] == "gptq"):
            found = {row["method"]: row for row in rows if row["merge"] == merge and row["bits"] in (None, 4)}
            if set(methods) <= found.keys():
                means = [score(found[method], found[method]["mean"]) for method in methods]
                gap = f"{percent(found['expert_guided']['gap_recovered'], 0)} %"
                lines.append(
                    "| "
                    + " | ".join(
                        [f"{path.stem}, {merge}, {NAMES[metric(rows[0])].removeprefix('mean ')}", *means, experts, gap]
                    )
                    + " |"
                )
    return "\n".join(lines)


def bits_table(paths: list[Path]) -> str:
    """Markdown for docs/choosing.md: widths across, a line a suite and method, merged by Task Arithmetic."""
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    merged = [row for rows in found.values() for row in rows if row["merge"] == "task_arithmetic"]
    grids = list(dict.fromkeys(grid(row) for row in merged if row["bits"]))
    head = ["suite", "merged", "method", *(title for name in grids for title in (name, "MB"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for suite, rows in found.items():
        ours = [row for row in rows if row["merge"] == "task_arithmetic"]
        full = next(row for row in ours if row["method"] == "none")
        for method in ("gptq", "expert_guided"):
            shown = [f"{suite}, {NAMES[metric(full)].removeprefix('mean ')}", score(full, full["mean"]), TITLES[method]]
            for name in grids:
                same = [row for row in ours if row["method"] == method and grid(row) == name]
                shown += [score(same[0], same[0]["mean"]), f"{same[0]['bytes'] / 1e6:.1f}"] if same else ["–", "–"]
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def faults_table(found: dict[str, Any]) -> str:
    """What became of runs that were killed, of disks that failed, of bad files and wrong merges, of runs done again."""
    kinds = {"write_faults": "writes that fail", "full_disks": "disks that are full"}
    lines = ["| fault | times | what became of it |", "|---|---|---|"]
    lines.append(
        f"| killed (signal 9) | {found['kills']} | {found['kills_with_finished_blocks']} with finished blocks; of "
        f"{found['runs']} runs {found['resumed_identical']} ended with the same bytes; errors {found['errors']}, left "
        f"behind {found['left_behind']} |"
    )
    for kind, title in kinds.items():
        if kind in found:
            refused, torn, same, left = (
                found[f"{kind}_{end}"] for end in ("refused", "torn", "resumed_identical", "left_behind")
            )
            lines.append(
                f"| {title} | {found[kind]} | {refused} errors that name the place; {torn} half outputs; {same} went "
                f"on to the same bytes; left behind {left} |"
            )
    if "mutated_inputs" in found:
        lines.append(
            f"| files changed at random | {found['mutated_inputs']} | {found['refused']} refused, {found['accepted']} "
            f"accepted; crashes {found['crashes']}, hangs {found['hangs']}, escapes {found['escapes']} |"
        )
    if "wrong_merges" in found:
        lines.append(f"| wrong merges | {found['wrong_merges']} | {found['wrong_merges_caught']} named |")
    if "related" in found:
        head = ["real experts of", "experts", "least correlation with their base", "greatest of a stranger"]
        lines += ["", "| " + " | ".join([*head, "greatest task vector over the base"]) + " |", "|" + 5 * "---|"]
        fields = ("least_of_experts", "greatest_of_strangers", "greatest_task_vector")
        for suite, row in found["related"].items():
            lines.append(f"| {suite} | {row['experts']} | " + " | ".join(f"{row[name]:.3f}" for name in fields) + " |")
    if "repeats" in found:
        lines += [
            "",
            "| the same run, but | weights with another code | largest difference over largest weight |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {100 * row['differing']:.3g} % | {row['largest']:.2g} |"
            for name, row in found["repeats"].items()
            if "differing" in row
        ]
        lines += [
            f"| half the batch size, {suite}, {method} | {100 * row['differing']:.3g} % | {row['largest']:.2g} |"
            for suite, rows in found.get("batches", {}).items()
            for method, row in rows.items()
        ]
    return "\n".join([*lines, "", measured([found])])


def replace_section(text: str, name: str, content: str) -> str:
    """Put `content` between the markers of a section.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README: no section '<!-- {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


SECTIONS: dict[str, Callable[[Any], str]] = {
    "shapes": shapes_table,
    "growth": growth_tables,
    "ablation": ablation_table,
    "limits": limits_table,
    "crossed": crossed_table,
    "codes": codes_table,
    "reproduce": reproduce_table,
    "solver": solver_table,
    "whole_run": whole_run_table,
    "merging": merging_table,
    "faults": faults_table,
}


def main() -> None:
    """Rewrite both READMEs and docs/choosing.md, or with --check say whether they are up to date."""
    paths = [HERE / "results" / f"{suite}.json" for suite in SUITES]
    paths = [path for path in paths if path.exists()]
    texts = {HERE / "README.md": (HERE / "README.md").read_text()}
    for path in paths:
        texts[HERE / "README.md"] = replace_section(texts[HERE / "README.md"], path.stem, suite_section(path))
    for name, table in SECTIONS.items():
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            content = table(json.loads(path.read_text()))
            texts[HERE / "README.md"] = replace_section(texts[HERE / "README.md"], name, content)
    for page, name, table in (("README.md", "summary", summary), ("docs/choosing.md", "bits", bits_table)):
        texts[HERE.parent / page] = replace_section((HERE.parent / page).read_text(), name, table(paths))
    if "--check" in sys.argv:
        stale = [str(path) for path, text in texts.items() if text != path.read_text()]
        sys.exit(f"not what the results say, run without --check: {', '.join(stale)}" if stale else 0)
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
