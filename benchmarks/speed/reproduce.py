"""`python -m benchmarks.speed.reproduce`: a published table at full size, without anybody's weights or data.

Builds a folder that looks like the Hub (`tests.kit.mirror`): base and experts with the published shapes and random
weights, data sets with a few random rows a split. Then runs the command that a user would, `epmq reproduce NAME --hub
FOLDER --limit N`, in a process of its own, and writes what each row took to `benchmarks/results/reproduce.json`. Scores
mean nothing here. The folder, some gigabytes under EPMQ_CACHE, is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks import RESULTS
from benchmarks.records import provenance
from benchmarks.speed.peers import cost_of
from epmq.files import cache_dir, write_json
from epmq.reproduce.tables import load_table
from tests.kit.mirror import build


def main() -> None:
    """Read the command line, build, run, and write what it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.reproduce", description=__doc__)
    parser.add_argument("name", nargs="?", default="clip-vit-b32-8", help="of a table")
    parser.add_argument("--limit", type=int, default=64, help="examples a task")
    parser.add_argument("--merge", action="append", help="only this merge; may be repeated; default task_arithmetic")
    parser.add_argument("--bits", type=int, action="append", help="only these bits; may be repeated; default 4")
    arguments = parser.parse_args()
    picked = [("--merge", merge) for merge in arguments.merge or ["task_arithmetic"]]
    picked += [("--bits", str(bits)) for bits in arguments.bits or [4]]
    root = cache_dir() / "mirrors"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        hub, out = Path(folder) / "hub", Path(folder) / "out"
        build(load_table(arguments.name), hub, tiny=False, rows=arguments.limit)
        size = sum(file.stat().st_size for file in hub.rglob("*") if file.is_file())
        Console(stderr=True).print(f"built {size / 1e9:.1f} GB")
        options = ["--hub", str(hub), "--limit", str(arguments.limit), "-o", str(out), "--quiet"]
        command = [str(Path(sys.executable).with_name("epmq")), "reproduce", arguments.name, *options]
        cost = cost_of([*command, *(part for pair in picked for part in pair)])
        content = json.loads((out / "table.json").read_text(encoding="utf-8"))
        shutil.rmtree(hub)
    fields = ("row", "seconds", "peak_memory_mb", "bytes", "notes")
    rows = [{field: row.get(field) for field in fields} for row in content["rows"] if "mean" in row]
    for row in rows:
        row["notes"] = [note.replace(f"{hub}/", "") for note in row["notes"]]
    about = {"name": arguments.name, "limit": arguments.limit, "input_bytes": size, **cost.as_dict()}
    where = provenance()
    write_json(RESULTS / "reproduce.json", {**about, "rows": rows, **where})


if __name__ == "__main__":
    main()
