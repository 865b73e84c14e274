"""`python -m benchmarks.pictures [DIR …]`: the pictures of the docs, from the results files and from runs.

`docs/gaps.svg` and `docs/sizes-SUITE.svg` come from `benchmarks/results/*.json`; `docs/depth.svg` from the last of the
output directories that are given, such as `epmq-demo/expert-guided` after `make demo`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.tables.markdown import SUITES
from epmq.reporting import charts
from epmq.reporting.page import packaged_text, render_page
from epmq.reporting.runs import gap, read_runs

DOCS = ROOT / "docs"


def gaps() -> str:
    """Gap recovered by bits, expert-guided on Task Arithmetic, a line a suite."""
    series: charts.Series = {}
    for suite in SUITES:
        runs, experts = read_runs([RESULTS / f"{suite}.json"])
        ours = [run for run in runs if run.method == "expert_guided" and run.merge == "task_arithmetic"]
        series[suite] = [(run.bits or 0, 100 * (gap(run, runs, experts) or 0)) for run in ours]
    return charts.lines(series, "bits", "gap recovered, %", lambda value: f"{value:.0f}")


def sizes(suite: str) -> str:
    """Size against score on Task Arithmetic."""
    runs, _ = read_runs([RESULTS / f"{suite}.json"])
    return figure(render_page([run for run in runs if run.merge == "task_arithmetic"]), "Size against score")


def figure(text: str, title: str) -> str:
    """The drawing of a page that has this title."""
    drawings = re.findall(r"<figure>(<svg.*?</svg>)<figcaption><b>(.*?)\.</b>", text, re.DOTALL)
    return next(svg for svg, name in drawings if name == title)


def standalone(svg: str) -> str:
    """A drawing as a file of its own, such as docs show: with its colours in it."""
    plain = "svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}"
    return svg.replace(">", f"><style>{plain}{packaged_text('charts.css')}</style>", 1) + "\n"


def main() -> None:
    """Read the command line and write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("outputs", nargs="*", metavar="DIR", help="output directories of runs")
    outputs = parser.parse_args().outputs
    drawn = {"gaps": gaps(), "sizes-text8": sizes("text8"), "sizes-vision8": sizes("vision8")}
    if outputs:
        drawn["depth"] = figure(render_page(read_runs([Path(outputs[-1])])[0]), "Loss by depth")
    for name, svg in drawn.items():
        (DOCS / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")


if __name__ == "__main__":
    main()
