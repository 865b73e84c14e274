"""`python -m benchmarks.speed.runtimes [--only demo|smollm2|heads]`: the low-bit model where people run models.

* `demo`: the four experts of `epmq demo` on MiniLM, expert-guided at 4 bits, in every runtime that is installed, beside
  the same model in float32 in the same runtime (`epmq bench`, one thread); and how many labels of 1,000 test texts are
  those of `epmq.load`.
* `smollm2`: three experts of SmolLM2-135M, merged and rounded to 4 bits in groups of 32, the same; and the perplexity
  of 160 test texts a task in llama.cpp beside that of `epmq.load`.
* `heads`: what 8 heads cost over one, in PyTorch and in onnxruntime.

Every part that is done goes to `benchmarks/results/runtimes.json`; `python -m benchmarks.tables` makes the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import epmq
from benchmarks import RESULTS
from benchmarks.records import provenance, read_rows
from benchmarks.suites import causal3, language
from benchmarks.suites.build import suite_dir
from epmq.data.encoding import encode
from epmq.data.examples import Examples
from epmq.demo.run import demo_pool, demo_recipe
from epmq.export.gguf_run import log_perplexity
from epmq.export.onnx_graph import open_session, run_session
from epmq.files import cache_dir, write_json
from epmq.pipeline.bench import bench

PATH = RESULTS / "runtimes.json"
TEXTS, BATCH, HEADS, PASSAGES = 1000, 32, 8, 160


def demo(work: Path) -> list[dict[str, Any]]:
    """The demo's model in every runtime, and whether its labels are the same."""
    recipe = demo_recipe(demo_pool(), quantize={"method": "expert_guided", "bits": 4}, output=str(work / "demo"))
    epmq.run(recipe, evaluate=False)
    rows = bench(work / "demo")
    agreed = {target: agreement(work / "demo", target) for target in ("onnx", "onnx-int8")}
    return [row | (agreed.get(row["runtime"], {}) if row["weights"] == "codes" else {}) for row in rows]


def agreement(checkpoint: Path, target: str) -> dict[str, Any]:
    """Share of the labels of 1,000 test texts that are those of `epmq.load`, and how far scores are off."""
    folder = checkpoint.with_name(target)
    epmq.export_checkpoint(checkpoint, target, folder)
    session = open_session(next((folder / "onnx").glob("*.onnx")))
    model, same, total, error, largest = epmq.load(checkpoint), 0, 0, 0.0, 0.0
    for batch in encode(Examples("text", test_texts()), model.processor, BATCH, 64):
        inputs = {one.name: batch[one.name] for one in session.get_inputs()}
        with torch.no_grad():
            ours = model.all_scores(**inputs)
        found = run_session(session, inputs)
        for mine, theirs in ((scores, found[task]) for task, scores in ours.items()):
            same, total = same + int((mine.argmax(1) == theirs.argmax(1)).sum()), total + len(mine)
            error, largest = max(error, float((mine - theirs).abs().max())), max(largest, float(mine.abs().max()))
    return {"agreement": same / total, "labels": total, "max_error": error / largest, "against": "epmq.load"}


def test_texts() -> list[str]:
    """Test texts of the demo's tasks, the same number of each."""
    found: list[str] = []
    tasks = sorted((cache_dir() / "demo" / "data").iterdir())
    for task in tasks:
        lines = (task / "test.jsonl").read_text().splitlines()[: TEXTS // len(tasks)]
        found += [json.loads(line)["text"] for line in lines]
    return found


def smollm2(work: Path) -> list[dict[str, Any]]:
    """Three experts of SmolLM2-135M merged, in every runtime; and the perplexity of their test texts in llama.cpp."""
    root = suite_dir("causal3")
    experts = [{"name": task, "model": str(root / "experts" / task)} for task in causal3.TASKS]
    recipe = {"base": str(root / "base"), "experts": experts, "output": str(work / "smollm2"), "formats": ["gguf"]}
    report = epmq.run(recipe | {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}, evaluate=False)
    [file] = (work / "smollm2").rglob("*.gguf")
    found = {"llama.cpp": report["exports"][0]["verified"] | {"log_perplexity": perplexities(work / "smollm2", file)}}
    rows = bench(work / "smollm2")
    return [row | ({"verified": found.get(row["runtime"])} if row["weights"] == "codes" else {}) for row in rows]


def perplexities(checkpoint: Path, file: Path) -> dict[str, dict[str, float]]:
    """Task → mean log-perplexity of its first test texts by `epmq.load` and by llama.cpp."""
    model, found = epmq.load(checkpoint), {}
    for task in causal3.TASKS:
        rows = language.read_rows(suite_dir("causal3") / "data" / task, "test")[:PASSAGES]
        batches = list(encode(language.examples_of(rows, causal3.KIND), model.processor, BATCH, causal3.MAX_LENGTH))
        sequences = [ids[mask.bool()] for one in batches for ids, mask in zip(one["input_ids"], one["attention_mask"])]
        with torch.no_grad():
            scores = [model.backbone(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for ids in sequences]
        given = torch.cat([score.gather(1, ids[1:, None]) for score, ids in zip(scores, sequences)])
        found[task] = {"epmq.load": -float(given.mean()), "llama.cpp": log_perplexity(file, sequences)}
    return found


def heads(work: Path) -> list[dict[str, Any]]:
    """Milliseconds of one text with 8 heads and with one."""
    root, rows = suite_dir("text8"), []
    for count in (1, HEADS):
        tasks = sorted(path.name for path in (root / "experts").iterdir())[:count]
        experts = [{"name": task, "model": str(root / "experts" / task)} for task in tasks]
        recipe = {"base": str(root / "base"), "experts": experts, "quantize": {"method": "rtn"}}
        folder = work / f"heads-{count}"
        epmq.run(recipe | {"output": str(folder)}, evaluate=False)
        rows += [row | {"heads": count} for row in bench(folder) if row["runtime"] in ("torch", "onnx")]
    return rows


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"demo": demo, "smollm2": smollm2, "heads": heads}


def main() -> None:
    """Read the command line and measure the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.runtimes", description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="measure one part; the others are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="epmq-runtimes-") as folder:
                rows = [{"suite": name, **row, **provenance()} for row in part(Path(folder))]
            write_json(PATH, [row for row in read_rows(PATH) if row["suite"] != name] + rows)
            Console(stderr=True).print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
