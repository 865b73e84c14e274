"""`python -m benchmarks.speed.solver`: time of the GPTQ solver on one layer, beside llm-compressor's and GPTQModel's.

Ours and theirs run in turn in one process with one thread (`solver_worker`, in the peers' interpreter), on
the same weight and Hessian. The floor is what the operations of the factor (n³/3) and of the updates (out · n²) would
take at the rate of a large matrix product on the same machine in the same run: of the fastest that there is, and of
PyTorch's `@`, in which the peers work. Writes `benchmarks/results/solver.json`; needs `make peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import RESULTS, ROOT
from benchmarks.records import provenance
from benchmarks.speed.peers import peer_python, peer_versions
from epmq.files import write_json


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.solver", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="each solver runs so often; the least time counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only; nothing is written")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [str(peer_python()), "-m", "benchmarks.speed.solver_worker", str(file)]
        command += ["--rounds", str(arguments.rounds), "--device", arguments.device, *["--quick"] * arguments.quick]
        paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "src"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows = json.loads(file.read_text())
    for row in rows:
        console.print(row)
    if not arguments.quick:
        torch.set_num_threads(1)  # as in the run itself: what `hardware` tells
        where = provenance()
        shared = ["torch", "transformers", "compressed-tensors", "safetensors", "numpy"]  # theirs is what ran
        where["versions"] |= peer_versions([*shared, "llmcompressor", "gptqmodel"])
        name = "solver" if arguments.device == "cpu" else f"solver-{arguments.device}"
        write_json(RESULTS / f"{name}.json", [{**row, **where} for row in rows])


if __name__ == "__main__":
    main()
