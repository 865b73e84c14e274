"""The table of faults."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import measured, table


def faults_table(results: dict[str, Any]) -> str:
    """What became of runs that were killed, of disks that failed, of bad files and wrong merges, of runs done again."""
    parts = [table(["fault", "times", "what became of it"], faults(results))]
    if "related" in results:
        fields = ("least_of_experts", "greatest_of_strangers", "greatest_task_vector")
        head = ["real experts of", "experts", "least correlation with their base", "greatest of a stranger"]
        lines = [
            [suite, str(row["experts"]), *(f"{row[name]:.3f}" for name in fields)]
            for suite, row in results["related"].items()
        ]
        parts.append(table([*head, "greatest task vector over the base"], lines))
    if "repeats" in results:
        head = ["the same run, but", "weights with another code", "largest difference over largest weight"]
        rows = {name: row for name, row in results["repeats"].items() if "differing" in row}
        for suite, methods in results.get("batches", {}).items():
            rows |= {f"half the batch size, {suite}, {method}": row for method, row in methods.items()}
        lines = [[name, f"{100 * row['differing']:.3g} %", f"{row['largest']:.2g}"] for name, row in rows.items()]
        parts.append(table(head, lines))
    return "\n\n".join([*parts, measured([results])])


def faults(results: dict[str, Any]) -> list[list[str]]:
    """Fault, how often, and what became of it."""
    became = (
        f"{results['kills_with_finished_blocks']} with finished blocks; of {results['runs']} runs "
        f"{results['resumed_identical']} ended with the same bytes; errors {results['errors']}, left behind "
        f"{results['left_behind']}"
    )
    lines = [["killed (signal 9)", f"{results['kills']}", became]]
    for fault, title in {"write_faults": "writes that fail", "full_disks": "disks that are full"}.items():
        if fault in results:
            ends = ("refused", "torn", "resumed_identical", "left_behind")
            refused, torn, same, left_behind = (results[f"{fault}_{end}"] for end in ends)
            became = f"{refused} errors that name the place; {torn} half outputs; {same} went on to the same bytes"
            lines.append([title, f"{results[fault]}", f"{became}; left behind {left_behind}"])
    if "mutated_inputs" in results:
        became = f"{results['refused']} refused, {results['accepted']} accepted; crashes {results['crashes']}"
        became += f", hangs {results['hangs']}, escapes {results['escapes']}"
        lines.append(["files changed at random", f"{results['mutated_inputs']}", became])
    if "wrong_merges" in results:
        lines.append(["wrong merges", f"{results['wrong_merges']}", f"{results['wrong_merges_caught']} named"])
    return lines + [_counted(name, results[name]) for name in ("identities", "combinations") if name in results]


def _counted(name: str, counts: dict[str, Any]) -> list[str]:
    """The line of a campaign that counts outcomes."""
    if name == "identities":
        became = f"{counts['right']} the expert itself, {counts['refused']} refused; wrong {counts['wrong']}"
        title = f"one expert alone, {counts['architectures']} architectures, tied and untied"
        return [title, f"{counts['cases']}", became]
    became = f"{counts['right']} right, {counts['noted']} with a note, {counts['refused'] + counts['declined']} refused"
    wrong = len(counts["failed"]) - counts["broken"]  # whose files the campaign itself could not make
    became = f"{became}, {counts['broken']} could not be made; wrong {wrong}"
    return ["combinations of models and data", f"{counts['drawn']}", became]
