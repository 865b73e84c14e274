"""`python -m benchmarks.speed.whole_run`: what a whole quantization costs, beside llm-compressor and GPTQModel.

A Llama of 8 blocks of width 1024 with random weights (float32), 64 sequences of 128 tokens, 4 bits, groups of 128, one
thread. Each tool is a process of its own that opens, quantizes and saves; they take turns. The peers quantize the base,
on the plain range of the weights, and two rows of ours do the very same, one of them with PyTorch's own matrix products
(`EPMQ_ONEDNN=0`). The others merge three experts first, and have the 64 sequences shared out among them, as mergekit
and then a peer would: their sums are rows too. Writes `benchmarks/results/whole_run.json`; needs `make peers`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import RESULTS
from benchmarks.records import provenance
from benchmarks.speed.merging import METHODS, merge_command
from benchmarks.speed.peers import Cost, cost_of, peer_python, peer_versions
from benchmarks.speed.shapes import LLAMA, Shape, tasks, write_models
from epmq.files import cache_dir, write_json

SAMPLES, TOKENS, VOCABULARY = 64, 128, 32000
SHAPE = Shape(
    "LlamaForCausalLM",
    {
        **LLAMA,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    layers=8,
    experts=3,
    samples=SAMPLES,
    tokens=TOKENS,
)
QUICK_LAYERS = 2
# The peers' own job: nothing is merged, and scales are the plain range of the weights, where our default searches them.
ALONE = "gptq of one model"
# The same where matrix products are PyTorch's own, in which the peers work.
PLAIN = "gptq of one model, by @"
OURS = {
    ALONE: {"method": "gptq", "scales": "minmax"},
    PLAIN: {"method": "gptq", "scales": "minmax"},
    "gptq": {"method": "gptq"},
    "E-PMQ": {"method": "e_pmq"},
    "expert-guided": {"method": "expert_guided"},
}
PEERS = ("llm-compressor", "GPTQModel")
MERGE = "mergekit"
# Of ours, those that the others are held against.
OWN = (ALONE, "gptq")


def sequences() -> torch.Tensor:
    """Random calibration tokens, [samples, tokens] int64."""
    return torch.randint(2, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))


def recipe(root: Path, tool: str, out: Path, device: str) -> dict[str, Any]:
    """The recipe of one of our rows."""
    models = {"base": root / "base"} if tool in (ALONE, PLAIN) else {name: root / name for name in tasks(SHAPE)}
    return {
        "base": str(root / "base"),
        "experts": [{"name": name, "model": str(path)} for name, path in models.items()],
        "merge": {"method": "task_arithmetic"},
        "quantize": {**OURS[tool], "bits": 4, "group_size": 128},
        "output": str(out),
        "device": device,
    }


def command(tool: str, root: Path, out: Path, device: str) -> list[str | Path]:
    """The command that makes one tool do the job."""
    if tool == MERGE:
        return merge_command(root, tasks(SHAPE), METHODS["task_arithmetic"][1], out.parent, "float32")
    tokens, here = root / "tokens.safetensors", Path(__file__)
    if tool in PEERS:
        return [peer_python(), here.with_name("peer_quantize.py"), tool, root / "base", tokens, out]
    file = out.parent / "recipe.json"
    write_json(file, recipe(root, tool, out, device))
    switch = ["env", "EPMQ_ONEDNN=0"] if tool == PLAIN else []
    return [*switch, sys.executable, here.with_name("our_quantize.py"), file, tokens]


def write_inputs(shape: Shape, root: Path) -> None:
    """Base, experts, a tokenizer that the peers ask for, and the calibration tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_models(shape, root)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0", unk_token="w0")
    tokenizer.save_pretrained(root / "base")
    save_file({"input_ids": sequences()}, root / "tokens.safetensors")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.whole_run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="each tool runs so often; the least time counts")
    parser.add_argument("--tools", nargs="*", default=(*OURS, *PEERS, MERGE), help="all by default")
    parser.add_argument("--quick", action="store_true", help="two blocks instead of eight; nothing is written")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # GPTQModel refuses to start with fewer than two workers.
    os.environ |= {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    console, costs = Console(stderr=True), {tool: list[Cost]() for tool in arguments.tools}
    shape = Shape(**{**vars(SHAPE), "layers": QUICK_LAYERS}) if arguments.quick else SHAPE
    root = cache_dir() / "shapes" / f"llama-{shape.layers}x1024"
    try:
        write_inputs(shape, root)
        for _ in range(arguments.rounds):
            for tool, runs in costs.items():
                with tempfile.TemporaryDirectory(dir=root) as work:
                    line = command(tool, root, Path(work) / "out", arguments.device)
                    # Peers leave logs where they are started.
                    runs.append(cost_of(line, Path(work)))
                console.print(f"{tool}: {runs[-1].as_dict()}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if not arguments.quick:
        write_results({tool: min(runs, key=lambda cost: cost.cpu_seconds) for tool, runs in costs.items()}, arguments)


def write_results(best: dict[str, Cost], arguments: Any) -> None:
    """Write the results file: a row a tool, with its processor time over that of our GPTQ."""
    rows = []
    if MERGE in best:
        best |= {f"{MERGE}, then {peer}": best[MERGE].then(best[peer]) for peer in PEERS if peer in best}
    for tool, cost in best.items():
        ratios = {f"over {one}": round(cost.cpu_seconds / best[one].cpu_seconds, 2) for one in OWN if one in best}
        rows.append({"tool": tool, **cost.as_dict(), **ratios})
    job = {"blocks": SHAPE.layers, "width": 1024, "samples": SAMPLES, "tokens": TOKENS, "experts": SHAPE.experts}
    where = {"device": arguments.device, **provenance()}
    where["versions"] |= peer_versions(["llmcompressor", "gptqmodel", "mergekit", "torch"])
    write_json(RESULTS / "whole_run.json", {**job, "rounds": arguments.rounds, "rows": rows, **where})


if __name__ == "__main__":
    main()
