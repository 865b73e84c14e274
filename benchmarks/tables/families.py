"""The table of families in docs/inputs.md."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import measured, table

# Kinds of tiny architectures, in the order in which they are shown, and what they are called.
KINDS = {
    "encoder": "text encoders",
    "decoder": "decoders",
    "seq2seq": "encoder–decoders",
    "image": "image encoders",
    "dual": "two towers",
    "vision_language": "vision-language models",
    "audio": "sounds",
    "speech": "speech",
    "part": "experts that are a part",
}
METHODS = {"merge": "merge", "rtn": "RTN", "gptq": "GPTQ", "expert_guided": "expert-guided"}


def families_table(results: dict[str, Any]) -> str:
    """Kinds of models with the same outcome in one line each; what is refused, and why, below."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(results["rows"], key=lambda row: list(KINDS).index(row["kind"])):
        opens = {True: "opens", False: "no", None: "–"}.get(row["opens"], f"opens, {row['opens']}")
        cells = (KINDS[row["kind"]], *(_cell(row[name]) for name in METHODS), opens)
        lines.setdefault(cells, []).append(f"`{row['model']}`" if row["kind"] != "part" else _part(row))
    head = ["kind", "families", *METHODS.values(), "packed, in transformers"]
    rows = [[kind, ", ".join(dict.fromkeys(names)), *cells] for (kind, *cells), names in lines.items()]
    reasons: dict[str, list[str]] = {}
    for row in results["rows"]:
        for reason in dict.fromkeys(row[name] for name in METHODS if row[name] != "right"):
            reasons.setdefault(_reason(reason, row), []).append(f"`{row['model']}`")
    listed = [f"* {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    parts = [table(head, rows), "\n".join(listed), measured([results])]
    return "\n\n".join(part for part in parts if part)


def _cell(outcome: str) -> str:
    return {"right": "yes", "refused": "refused"}.get(outcome.partition(":")[0], "**wrong**")


def _part(row: dict[str, Any]) -> str:
    whole = row["family"].rpartition(" of ")[2]
    return f"`{row['model']}` of {whole}"


def _reason(outcome: str, row: dict[str, Any]) -> str:
    """Why, in words without the names of one model."""
    said = outcome.partition(": ")[2]
    if "converted by transformers" in said:
        return "tensors are converted by transformers on load, which epmq does not do yet"
    return said.replace(row["model"], "the model").rpartition(": /tmp")[2]
