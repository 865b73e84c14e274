"""`python -m benchmarks.tables`: make the tables of READMEs and docs from `benchmarks/results/*.json`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.tables import accuracy, families, faults, speed
from benchmarks.tables.markdown import SUITES

README = ROOT / "benchmarks" / "README.md"
# Section of the benchmarks' README, which is also the name of a results file → its table.
SECTIONS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(SUITES, accuracy.suite_section),
    "shapes": speed.shapes_table,
    "growth": speed.growth_tables,
    "ablation": accuracy.ablation_table,
    "limits": accuracy.limits_table,
    "crossed": accuracy.crossed_table,
    "codes": accuracy.codes_table,
    "storage": accuracy.storage_tables,
    "merges": accuracy.merges_table,
    "reproduce": speed.reproduce_table,
    "solver": speed.solver_table,
    "whole_run": speed.whole_run_table,
    "merging": speed.merging_table,
    "device": speed.device_table,
    "runtimes": speed.runtimes_tables,
    "page": speed.page_table,
    "faults": faults.faults_table,
}


def replace_section(text: str, name: str, content: str) -> str:
    """Put `content` between the markers of a section.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README: no section '<!-- {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def main() -> None:
    """Rewrite both READMEs, docs/choosing.md and docs/inputs.md, or with --check say whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not up to date")
    arguments = parser.parse_args()
    results = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    contents = {name: json.loads(path.read_text()) for name, path in results.items() if path.exists()}
    suites = {name: contents[name] for name in SUITES if name in contents}
    texts = {path: path.read_text() for path in (README, ROOT / "README.md", ROOT / "docs" / "choosing.md")}
    for name, content in contents.items():
        texts[README] = replace_section(texts[README], name, SECTIONS[name](content))
    inputs, found = ROOT / "docs" / "inputs.md", RESULTS / "families.json"
    if found.exists():
        content = families.families_table(json.loads(found.read_text()))
        texts[inputs] = replace_section(inputs.read_text(), "families", content)
    for path, name, table in (
        (ROOT / "README.md", "summary", accuracy.summary),
        (ROOT / "docs" / "choosing.md", "bits", accuracy.bits_table),
    ):
        texts[path] = replace_section(texts[path], name, table(suites))
    if "storage" in contents:
        readme = ROOT / "README.md"
        texts[readme] = replace_section(texts[readme], "sizes", accuracy.storage_table(contents["storage"], "tables"))
    if arguments.check:
        stale = [str(path) for path, text in texts.items() if text != path.read_text()]
        sys.exit(f"not what the results say, run without --check: {', '.join(stale)}" if stale else 0)
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
