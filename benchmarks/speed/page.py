"""`python -m benchmarks.speed.page`: pages of `epmq page` in Chromium, opened from the disk with no network.

For the demo's four tasks and for vision8's eight, rounded to 4 bits: are the labels on the page those of `epmq.load`,
on test texts and pictures of every task; how long an answer takes, and how large the page is. Needs Chromium, npm and
node; what came out goes to `benchmarks/results/page.json`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

import epmq
from benchmarks import RESULTS
from benchmarks.records import provenance
from benchmarks.suites.build import suite_dir
from epmq.files import cache_dir, write_json
from tests.kit.browser import Browser, browser

PATH = RESULTS / "page.json"
EACH = 10  # texts or pictures of a task
ANSWERS = "[...document.querySelectorAll('.task')].map((task) => task.querySelector('.answer').textContent)"


def checkpoint(root: Path, folder: Path) -> Path:
    """The experts of a pool, merged and rounded to 4 bits."""
    experts = [{"name": path.name, "model": str(path)} for path in sorted((root / "experts").iterdir())]
    recipe = {"base": str(root / "base"), "experts": experts, "quantize": {"method": "rtn"}, "output": str(folder)}
    epmq.run(recipe, evaluate=False)
    return folder


def texts(root: Path) -> list[str]:
    """Test texts of every task."""
    files = sorted((root / "data").glob("*/test.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()[:EACH]]


def pictures(root: Path, folder: Path) -> list[str]:
    """Test pictures of every task, as files."""
    found = []
    for file in sorted((root / "data").glob("*/test.npz")):
        content = np.load(file)
        images = next(content[name] for name in content.files if content[name].ndim > 2)
        for number, image in enumerate(images[:EACH]):
            found.append(str(folder / f"{file.parent.name}-{number}.png"))
            Image.fromarray(image).convert("RGB").save(found[-1])
    return found


def measure(tab: Browser, folder: Path, inputs: Sequence[str]) -> dict[str, Any]:
    """Open the page of a checkpoint and give it all inputs."""
    page = Path(epmq.page_checkpoint(folder)["page"])
    tab.problems.clear()
    tab.open(page.as_uri())
    tab.wait("document.documentElement?.dataset.state")
    model, same, times = epmq.load(folder), 0, list[float]()
    ours = model.answer_all(inputs)
    for number, one in enumerate(inputs):
        tab.run("say('')")
        if one.endswith(".png"):
            tab.choose_file("#picture", Path(one))
        else:
            tab.run(f"element('text').value = {json.dumps(one)}; element('text').dispatchEvent(new Event('input'))")
        said = tab.wait("/ ms|cannot/.test(element('status').textContent) && element('status').textContent")
        times += [float(found) for found in re.findall(r"([\d.]+) ms", said)[:1]]
        same += sum(a == b for a, b in zip(tab.run(ANSWERS), (ours[task][number] for task in model.tasks)))
    size = sum(file.stat().st_size for file in page.parent.rglob("*") if file.is_file())
    facts = {"tasks": len(model.tasks), "inputs": len(inputs), "labels": len(inputs) * len(model.tasks), "same": same}
    return {**facts, "bytes": size, "ms": median(times), "console": tab.problems}


def main() -> None:
    """Measure both pages."""
    pools = {"demo": cache_dir() / "demo", "vision8": suite_dir("vision8")}
    rows = []
    with tempfile.TemporaryDirectory(prefix="epmq-page-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        for suite, root in pools.items():
            (work / suite).mkdir()
            inputs = texts(root) or pictures(root, work / suite)
            with browser(work / suite) as tab:
                row = measure(tab, checkpoint(root, work / f"{suite}-4bit"), inputs)
            rows.append({"suite": suite, **row, **provenance()})
            Console(stderr=True).print(rows[-1])
            write_json(PATH, rows)


if __name__ == "__main__":
    main()
