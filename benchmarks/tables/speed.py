"""Tables of time and memory."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.speed.growth import EXPECTED, GROWN, exponent, grown
from benchmarks.speed.whole_run import OWN
from benchmarks.tables.markdown import measured, table
from epmq.pipeline.bench import FIGURES, figures_of


def shapes_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a shape, then what it was measured with."""
    phases = ("check", "merge", "forward", "moments", "targets", "solve", "write")
    head = ["shape", "parameters", "experts", "samples, tokens a task", "GB in", "GB out", "threads", "minutes"]
    lines = []
    for row in rows:
        total = sum(row["seconds"].values())
        cells = [row["name"], f"{row['parameters'] / 1e6:.0f} M", f"{row['experts']}"]
        cells += [f"{row['samples']}, {row['tokens']}", f"{row['input_bytes'] / 1e9:.1f}"]
        cells += [f"{row['output_bytes'] / 1e9:.2f}", f"{row['hardware']['threads']}", f"{total / 60:.1f}"]
        cells += [f"{100 * row['seconds'].get(phase, 0) / total:.0f}" for phase in phases]
        lines.append([*cells, f"{row['peak_memory_mb'] / 1e3:.1f}"])
    return "\n".join([table([*head, *(f"{phase} %" for phase in phases), "peak GB"], lines), "", measured(rows)])


def growth_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a run of `benchmarks.speed.growth`, then the exponents beside those that are expected."""
    fields = {"cpu_seconds": "s, processor", "peak_memory_mb": "peak MB", "output_bytes": "output bytes"}
    head = [*GROWN, *(title for field in fields.values() for title in (field, "predicted")), "s, wall"]
    runs = []
    for row in rows:
        cells = [str(row[name]) for name in GROWN]
        for field in fields:
            predicted = row["predicted"][field]
            cells += [f"{row[field]}", f"{predicted} ({100 * (predicted / row[field] - 1):+.0f} %)"]
        runs.append([*cells, str(row["seconds"])])
    exponents = []
    for name in GROWN:
        cells = [name]
        for cost in EXPECTED:
            cells += [f"{exponent(grown(rows, name), name, cost):.2f}", EXPECTED[cost][name]]
        exponents.append(cells)
    growth = table(["grows", "s, processor", "expected", "MB beyond those when all is open", "expected"], exponents)
    return "\n".join([table(head, runs), "", growth, "", measured(rows)])


def reproduce_table(results: dict[str, Any]) -> str:
    """Markdown: one line a row of a published table that was run at full size."""
    lines = []
    for row in results["rows"]:
        phases = ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in row["seconds"].items())
        peak = "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}"
        lines.append([row["row"], f"{sum(row['seconds'].values()):.0f}", phases, peak, size])
    whole = (
        f"{results['name']}, at most {results['limit']} examples a task: {results['seconds'] / 60:.1f} minutes in all"
    )
    total = f"{whole}, {results['cpu_seconds'] / 60:.1f} of processor time, {results['peak_memory_mb']:.0f} MB at most."
    return "\n".join([table(["row", "s", "phases", "peak MB", "MB"], lines), "", total, "", measured([results])])


def solver_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a shape and peer of `benchmarks.speed.solver`."""
    head = ["out × in", "rounds", "ours, s", "over the floor", "at `@`'s rate", "peer", "peer, s", "times ours"]
    head += ["error, ours", "error, peer"]
    lines = []
    for row in rows:
        cells = [f"{row['out']} × {row['in']}", f"{row['rounds']}", f"{row['ours_seconds']:.3f}"]
        cells += [f"{row['floor_ratio']:.1f}×", f"{row['torch_floor_ratio']:.1f}×"]
        cells += [row["peer"], f"{row['peer_seconds']:.3f}", f"{row['ratio']:.1f}×"]
        lines.append([*cells, f"{row['hessian_error_ours']:.5f}", f"{row['hessian_error_peer']:.5f}"])
    fast, usual = (max(row[name] for row in rows) for name in ("matmul_gflops", "torch_matmul_gflops"))
    rates = f"10⁹ operations a second in a product of 2048³: {fast:.0f}, by `@` {usual:.0f}."
    return "\n".join([table(head, lines), "", rates, "", measured(rows)])


def whole_run_table(results: dict[str, Any]) -> str:
    """Markdown: one line a tool of `benchmarks.speed.whole_run`."""
    head = ["tool", "s, processor", *(f"over our {method}" for method in OWN), "s", "peak MB"]
    lines = []
    for row in results["rows"]:
        cells = [row["tool"], f"{row['cpu_seconds']:.0f}", *(f"{row[f'over {method}']:.2f}×" for method in OWN)]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['peak_memory_mb']:.0f}"])
    return "\n".join([table(head, lines), "", measured([results])])


def merging_table(results: dict[str, Any]) -> str:
    """Markdown: one line a merge, ours beside mergekit's, then the least that a merge can take."""
    lines = []
    for row in results["rows"]:
        cells = [row["method"]]
        for name, ratio in (("cpu_seconds", "cpu_ratio"), ("peak_memory_mb", "memory_ratio")):
            cells += [f"{row['ours'][name]:.0f}", f"{row['mergekit'][name]:.0f}", f"{row[ratio]:.1f}×"]
        lines.append(cells)
    merges = table(["merge", "CPU s", "mergekit", "ratio", "peak MB", "mergekit", "ratio"], lines)
    least = ", ".join(f"{name} {seconds:.1f}" for name, seconds in results["floor_cpu_seconds"].items())
    return "\n".join([merges, "", f"CPU seconds without any merging: {least}.", "", measured([results])])


def device_table(results: dict[str, Any]) -> str:
    """Markdown: what `benchmarks.speed.device` measured; a part that was cut off is left out."""
    rate, parts = results.get("rates", {}), []
    if rate:
        products = ", ".join(f"{name} {rate[name]:.0f}" for name in ("float32", "tf32", "bfloat16"))
        rates = f"10¹² operations a second in a product of {rate['size']}³: {products}"
        parts.append(f"{rates}; 10⁹ bytes read and written a second in a copy: {rate['copy_gb']:.0f}.")
    if "tests" in results:
        tests = results["tests"]
        parts.append(f"Tests that need a device: {tests['passed']} passed, {len(tests['failed'])} failed.")
    good = {
        name: [row for row in results.get(name, []) if "failed" not in row] for name in ("equality", "solver", "runs")
    }
    makers = {"equality": _equality, "solver": _device_solver, "runs": _device_runs}
    parts += [maker(good[name]) for name, maker in makers.items() if good[name]]
    failed = [f"{row['name']} ({row['failed']})" for name in good for row in results.get(name, []) if "failed" in row]
    parts += [f"Failed: {'; '.join(failed)}."] if failed else []
    return "\n\n".join([*parts, f"{results['hardware']['accelerator'] or 'No accelerator'}. {measured([results])}"])


def _equality(rows: list[dict[str, Any]]) -> str:
    head = [
        "method",
        "equal codes, %",
        "loss, %",
        "layers within 1 %",
        "largest, %",
        "files that change from run to run",
    ]
    lines = []
    for row in rows:
        shares = [f"{100 * row['equal_codes']:.2f}", f"{100 * row['loss_difference']:+.2f}"]
        cells = [row["name"], *shares, f"{row['within_one_percent']} of {row['layers']}"]
        lines.append([*cells, f"{100 * row['largest_loss_difference']:.2f}", ", ".join(row["changed_files"]) or "none"])
    return table(head, lines)


def _device_solver(rows: list[dict[str, Any]]) -> str:
    head = [
        "out × in",
        "s",
        "over the floor",
        "factor",
        "codes",
        "with searched scales",
        "256 columns, ms",
        "as a graph",
        "error",
    ]
    lines = []
    for row in rows:
        parts, block = row["parts"], row.get("block", {})
        cells = [row["name"], f"{row['seconds']:.3f}", f"{row['over_floor']:.1f}×"]
        cells += [f"{parts[name]:.3f}" for name in ("factor", "codes", "scales searched")]
        cells += [f"{1e3 * block[name]:.2f}" if name in block else "–" for name in ("calls", "replay")]
        lines.append([*cells, f"{row['error']:.5f}"])
    return table(head, lines)


def _device_runs(rows: list[dict[str, Any]]) -> str:
    head = ["run", "blocks", "tokens", "s", "s by phase", "10¹² operations", "s computing", "over float32's rate"]
    head += ["over bfloat16's", "device peak GB", "peak GB"]
    lines = []
    for row in rows:
        phases = ", ".join(f"{name} {value:.1f}" for name, value in row["phases"].items() if value >= 0.1)
        cells = [row["name"], f"{row['blocks']}", f"{row['tokens']}", f"{row['seconds']:.1f}", phases]
        cells += [f"{sum(row['operations'].values()):.0f}", f"{row['computing_seconds']:.1f}"]
        cells += [f"{row['over_float32']:.1f}×", f"{row['over_bfloat16']:.1f}×"]
        lines.append([*cells, f"{(row['device_peak_mb'] or 0) / 1e3:.1f}", f"{row['peak_memory_mb'] / 1e3:.1f}"])
    return table(head, lines)


def runtimes_tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: models in the runtimes, with ratios to float32 in the same one; and what heads cost."""
    lines = []
    for row in (row for row in rows if "heads" not in row):
        figures = figures_of(row, [one for one in rows if one["suite"] == row["suite"]])
        agreed = f"{100 * row['agreement']:.1f} % of {row['labels']}" if "agreement" in row else "–"
        lines.append([row["suite"], row["runtime"], row["weights"], *figures, agreed])
    parts = [table(["model", "runtime", "weights", *FIGURES, "labels as in PyTorch"], lines)]
    many = [row for row in rows if "heads" in row]
    if many:
        heads = [[row["runtime"], row["weights"], str(row["heads"]), f"{row['latency_ms']:.1f}"] for row in many]
        parts += ["", table(["runtime", "weights", "heads", "ms, one example"], heads)]
    verified = [row["verified"] for row in rows if row.get("verified")]
    found: dict[str, Any] = next((one["log_perplexity"] for one in verified if "log_perplexity" in one), {})
    if found:
        head = ["perplexity of test texts", *next(iter(found.values())), "ratio"]
        values = [(task, math.exp(one["epmq.load"]), math.exp(one["llama.cpp"])) for task, one in found.items()]
        parts += ["", table(head, [[task, f"{a:.3f}", f"{b:.3f}", f"{b / a:.4f}"] for task, a, b in values])]
    return "\n".join([*parts, "", measured(rows)])


def page_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: pages in a browser."""
    head = ["page", "tasks", "inputs", "labels as in Python", "MB in all", "ms, one input", "errors in the console"]
    lines = []
    for row in rows:
        cells = [row["suite"], str(row["tasks"]), str(row["inputs"]), f"{row['same']} of {row['labels']}"]
        lines.append([*cells, f"{row['bytes'] / 1e6:.1f}", f"{row['ms']:.0f}", str(len(row["console"]))])
    return "\n".join([table(head, lines), "", measured(rows)])
