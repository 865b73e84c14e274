"""`python tests/golden.py`: hashes of every file that runs of tiny recipes write, to be compared between two commits.

    python tests/golden.py --write FILE     # on the commit before a change
    python tests/golden.py --check FILE     # after it: names every file whose bytes differ

Nothing but the public names of epmq and the command line is used, so that the same script runs on both sides of a move.
What tells of time is left out: dates, seconds, memory. A recipe as a report shows it has a hash of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from conftest import build_pool, padded_batches, perturbed, recipe_for, tiny_bert, word_tokenizer, write_texts  # noqa: E402
from families import FAMILIES  # noqa: E402

import epmq  # noqa: E402

QUIET = {"progress": False}
TIMED = ("date", "seconds", "cpu_seconds", "peak_memory_mb", "hardware", "versions")
Case = Callable[[Path], None]

# A method, a grid and a format for each family, so that all of them are met.
FORMS: list[dict[str, Any]] = [
    {"quantize": {"method": "expert_guided", "bits": 4}},
    {"quantize": {"method": "gptq", "bits": 3, "group_size": 32}},
    {"quantize": {"method": "e_pmq", "bits": 4, "symmetric": False}, "merge": {"method": "ties"}},
    {"quantize": {"method": "expert_guided", "bits": 2, "group_size": 32}, "format": "dequantized"},
    {"quantize": {"method": "rtn", "bits": 8}},
    {"quantize": {"method": "gptq", "bits": 4, "scales": "minmax", "act_order": False}, "format": "dequantized"},
]
MERGES: list[dict[str, Any]] = [
    {"method": "average", "weights": [1.0, 3.0]},
    {"method": "task_arithmetic", "scaling": [0.5, 0.2]},
    {"method": "ties", "density": 0.3, "agreed": "sum", "scaling": 0.3, "trim": "tensor"},
    {"method": "ties"},
    {"method": "dare", "density": 0.4},
    {"method": "dare", "combine": "ties", "scaling": 0.7},
]
QUANTIZERS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"method": "gptq"},
    {"method": "gptq", "adapt_heads": True},
    {"method": "e_pmq", "anchor_strength": 0.1},
    {"method": "expert_guided"},
    {"method": "expert_guided", "expert_features": 0.5, "expert_stream": False, "adapt_heads": False},
    {"method": "expert_guided", "task_weights": {"one": 1.0, "two": 3.0}, "anchor_scale": 1.5, "damping": 0.1},
]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """A report, or a table of reports, without what differs from run to run."""
    if isinstance(report, dict):
        return {name: without_times(value) for name, value in report.items() if name not in (*TIMED, "recipe")}
    return [without_times(value) for value in report] if isinstance(report, list) else report


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of all files in a folder, and of all folders in it."""
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file():
            yield f"{name}/", ""
        elif file.name.endswith("json") and (file.name == "report.json" or "reports" in file.parts or "table" in name):
            content = json.loads(file.read_text())
            yield name, digest(json.dumps(without_times(content), sort_keys=True).encode())
            if "recipe" in content:
                yield f"{name}#recipe", digest(json.dumps(content["recipe"], sort_keys=True).encode())
        elif file.name == "report.html":
            text = re.sub(r"<pre>.*?</pre>|<td>[0-9]+ s</td>", "", file.read_text(), flags=re.DOTALL)
            # Settings that a merge does not use, or that are its defaults, are not shown any more.
            text = re.sub(r" \(agreed mean\)|, agreed mean|agreed mean, ", "", text)
            yield name, digest(text.encode())
        elif file.name == "table.md":
            lines = [line.rsplit("|", 2)[0] for line in file.read_text().splitlines() if line.startswith("|")]
            yield name, digest("\n".join(lines).encode())
        else:
            yield name, digest(file.read_bytes())


def family_case(name: str, fields: dict[str, Any]) -> Case:
    def run(root: Path) -> None:
        family, experts, data = FAMILIES[name], [], {}
        torch.manual_seed(0)
        family.build().save_pretrained(root / "base")
        for seed, task in enumerate(("one", "two"), start=1):
            model = type(family.build()).from_pretrained(root / "base")
            perturbed(model, seed).save_pretrained(root / task)
            experts.append({"name": task, "model": str(root / task)})
            data[task] = family.batches()
        content = {"base": str(root / "base"), "experts": experts, **fields}
        if name == "gpt2":
            content["format"] = "dequantized"
        epmq.run({**content, "output": "out"}, calibration=data, **QUIET)

    return run


def pool_case(**fields: Any) -> Case:
    """A recipe over BERT experts with heads, scored on labelled texts."""

    def run(root: Path) -> None:
        build_pool(root)
        epmq.run(recipe_for(root, output="out", **fields), **QUIET)

    return run


def merge_case(merge: dict[str, Any]) -> Case:
    def run(root: Path) -> None:
        build_pool(root)
        epmq.merge(recipe_for(root, output="out", merge=merge), **QUIET)

    return run


def stopped_case(root: Path) -> None:
    """A run that ends with an error when its blocks are finished, and goes on."""
    build_pool(root)
    recipe = recipe_for(root, output="out")
    replaced, moved = Path.rename, []

    def fail(path: Path, target: Any) -> Path:
        if str(target).endswith("out"):
            moved.append(path)
            raise OSError("stopped")
        return replaced(path, target)

    Path.rename = fail  # type: ignore[method-assign]
    try:
        epmq.run(recipe, **QUIET)
    except OSError:
        pass
    finally:
        Path.rename = replaced  # type: ignore[method-assign]
    assert moved, "the run was not stopped"
    epmq.run(recipe, **QUIET)


def lora_case(root: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    build_pool(root)
    for seed, task in enumerate(("one", "two"), start=1):
        expert = root / "experts" / task
        (expert / "model.safetensors").unlink()
        (expert / "config.json").unlink()
        torch.manual_seed(seed)
        settings = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "output.dense"], init_lora_weights=False)
        get_peft_model(BertModel.from_pretrained(root / "base"), settings).save_pretrained(expert)
    epmq.run(recipe_for(root, output="out"), **QUIET)


def native_heads_case(root: Path) -> None:
    """Experts of a task class of transformers, with labels of their own."""
    from transformers import BertForSequenceClassification

    build_pool(root)
    for seed, (task, labels) in enumerate({"one": 3, "two": 4}.items(), start=1):
        expert = root / "experts" / task
        shutil.rmtree(expert)
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(root / "base", num_labels=labels)
        perturbed(model, seed).save_pretrained(expert)
    epmq.run(recipe_for(root, output="out", quantize={"bits": 3, "group_size": 32}), **QUIET)


def language_case(name: str, kind: str) -> Case:
    """A language model on texts, as windows or as source and target."""

    def run(root: Path) -> None:
        torch.manual_seed(0)
        FAMILIES[name].build().save_pretrained(root / "base")
        word_tokenizer(ends=kind == "seq2seq").save_pretrained(root / "base")
        experts = []
        for seed, task in enumerate(("one", "two"), start=1):
            model = type(FAMILIES[name].build()).from_pretrained(root / "base")
            perturbed(model, seed).save_pretrained(root / task)
            file = write_texts(root / f"{task}.jsonl", 40, 3, seed)
            if kind == "seq2seq":
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                targets = [{"text": row["text"], "target": row["text"].split()[0]} for row in rows]
                file.write_text("".join(json.dumps(row) + "\n" for row in targets))
            data = {"path": str(file)}
            experts.append({"name": task, "model": str(root / task), "calibration": data, "evaluation": data})
        recipe = {"base": str(root / "base"), "experts": experts, "max_length": 16, "batch_size": 4, "output": "out"}
        epmq.run(recipe, **QUIET)

    return run


def half_precision_case(root: Path) -> None:
    """Weights stored in bfloat16."""
    build_pool(root)
    for folder in (root / "base", root / "experts" / "one", root / "experts" / "two"):
        model = tiny_bert().from_pretrained(folder, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    epmq.run(recipe_for(root, output="out"), **QUIET)


def batches_case(root: Path) -> None:
    """Ready batches in place of the recipe's data."""
    build_pool(root)
    data = {task: padded_batches(4) for task in ("one", "two")}
    epmq.run(recipe_for(root, output="out"), calibration=data, evaluate=False, **QUIET)


def report_case(root: Path) -> None:
    """Two runs on one page, made from reports without times."""
    from typer.testing import CliRunner

    from epmq.cli import app

    build_pool(root)
    for method in ("gptq", "expert_guided"):
        epmq.run(recipe_for(root, output=f"made/{method}", quantize={"method": method}), **QUIET)
        report = json.loads(Path(f"made/{method}/report.json").read_text())
        report |= {"date": "", "seconds": {"run": 1.0}, "cpu_seconds": {}, "peak_memory_mb": 1.0, "hardware": {}}
        Path("out").mkdir(exist_ok=True)
        Path(f"{method}.json").write_text(json.dumps(report))
    found = CliRunner().invoke(app, ["report", "gptq.json", "expert_guided.json", "-o", "out/report.html"])
    assert found.exit_code == 0, found.output


def reproduce_case(root: Path) -> None:
    """A table of CLIP models on a folder that looks like the Hub."""
    from typer.testing import CliRunner

    from epmq.cli import app

    build_hub("clip-vit-b32-8", root)
    os.environ["EPMQ_CACHE"] = str(root / "cache")
    picked = ["--merge", "ties", "--method", "rtn", "--method", "expert_guided", "--bits", "4", "--limit", "8"]
    arguments = ["reproduce", "clip-vit-b32-8", "--hub", str(root), "-o", "out", "--keep", "--quiet", *picked]
    found = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output


def build_hub(table: str, folder: Path) -> None:
    try:
        from tests.kit.mirror import build
    except ImportError:
        from benchmarks.mirror import build
    try:
        from epmq.reproduce.tables import load_table
    except ImportError:
        from epmq.tables import load_table
    build(load_table(table), folder)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {
        f"family-{name}": family_case(name, FORMS[number % len(FORMS)]) for number, name in enumerate(FAMILIES)
    }
    for number, merge in enumerate(MERGES):
        found[f"merge-{number}-{merge['method']}"] = merge_case(merge)
    for number, quantize in enumerate(QUANTIZERS):
        found[f"quantize-{number}-{quantize['method']}"] = pool_case(quantize=quantize)
    return {
        **found,
        "ties-expert_guided": pool_case(merge={"method": "ties"}),
        "dequantized": pool_case(format="dequantized", quantize={"bits": 3, "symmetric": False}),
        "activations-disk": pool_case(activations="disk"),
        "stopped": stopped_case,
        "lora": lora_case,
        "native-heads": native_heads_case,
        "half-precision": half_precision_case,
        "batches": batches_case,
        "causal": language_case("smollm2", "causal"),
        "seq2seq": language_case("flan_t5", "seq2seq"),
        "report": report_case,
        "reproduce": reproduce_case,
    }


def run_all(only: str) -> dict[str, str]:
    """Hash of every file that the cases write."""
    found = {}
    for name, case in cases().items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            before = os.getcwd()
            os.chdir(folder)  # paths in reports are relative, and so the same in every folder
            try:
                case(Path("pool"))
                found |= {f"{name}/{file}": value for file, value in hashes(Path("out"))}
            finally:
                os.chdir(before)
        print(name, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the hashes to this file")
    parser.add_argument("--check", type=Path, help="compare with the hashes in this file")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    arguments = parser.parse_args()
    found = run_all(arguments.only)
    print(f"{len(found)} files; all together: {digest(json.dumps(found, sort_keys=True).encode())}")
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if arguments.check:
        wanted = {
            name: value for name, value in json.loads(arguments.check.read_text()).items() if arguments.only in name
        }
        changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        print("\n".join(changed) or "all the same")
        sys.exit(bool(changed))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
