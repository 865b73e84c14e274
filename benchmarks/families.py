"""`python -m benchmarks.families`: which architectures are merged, quantized, packed and opened again.

Every tiny architecture of `tests.kit.architectures`, and experts that are a part of one, go through all that a recipe
can ask for. A merge is right where one expert at scaling 1.0 is that expert, loaded by transformers alone; a quantizer,
where the packed model that `epmq.load` opens gives what the plain model of the same run gives; and the packed model
opens in transformers where plain `from_pretrained` gives the same as well. Writes `benchmarks/results/families.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from rich.console import Console

import epmq
from benchmarks import RESULTS
from benchmarks.records import provenance
from epmq.errors import InputError
from epmq.files import write_json
from tests.kit.architecture_kinds import Architecture
from tests.kit.architectures import ARCHITECTURES
from tests.kit.comparison import fine_tuned, gaps
from tests.kit.identity import TOLERANCE, merge_one, save_pair, unlike_the_expert

PATH = RESULTS / "families.json"
METHODS = ("rtn", "gptq", "expert_guided")
QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
# How far outputs may be off where transformers unpacks weights in float16, as it does with the experts of a mixture.
HALF = 1e-3
# Experts that are a part of an architecture: its name, the part's class, where it lies, and which sub-config it has.
PARTS = {
    "clip_vision of clip": ("clip", "CLIPVisionModel", "vision_model", "vision_config"),
    "llama of llava": ("llava", "LlamaForCausalLM", "model.language_model", "text_config"),
    "clip_vision of llava": ("llava", "CLIPVisionModel", "model.vision_tower", "vision_config"),
    "encoder of whisper": ("whisper", "WhisperEncoder", "model.encoder", None),
}
# What a part takes of the whole's batches.
TAKES = {"vision": ("pixel_values",), "llama": ("input_ids", "attention_mask"), "encoder": ("input_features",)}


def try_family(name: str, folder: Path) -> dict[str, Any]:
    """What becomes of an architecture, or of experts that are a part of one: a row of the results."""
    architecture = ARCHITECTURES.get(name)
    if architecture is not None:
        save_pair(architecture, folder)
        made, batches, kind = architecture.model, architecture.batches(), architecture.kind
        merged = attempt(lambda: _merge(architecture, folder))
    else:
        made, batches, kind = *save_part(name, folder), "part"
        merged = attempt(lambda: merge_one(folder))
    row: dict[str, Any] = {"family": name, "model": made, "kind": kind, "merge": merged}
    for method in METHODS:
        opened = dict[str, bool | str]()
        row[method] = attempt(partial(_quantize, folder, made, method, batches, opened))
        row["opens"] = opened.get("opens")
    return row


def attempt(work: Callable[[], Any]) -> str:
    """What becomes of some work: `right`, or why not, in one line."""
    try:
        work()
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:  # a fault of ours
        return f"wrong: {type(error).__name__}: {error}".splitlines()[0]
    return "right"


def _merge(architecture: Architecture, folder: Path) -> None:
    merge_one(folder)
    wrong = unlike_the_expert(architecture, folder)
    if wrong:
        raise RuntimeError("; ".join(wrong))


def save_part(name: str, folder: Path) -> tuple[str, list[dict[str, torch.Tensor]]]:
    """A base, and an expert that was fine-tuned from a part of it; returns the expert's class, and batches for it."""
    whole, class_name, path, settings = PARTS[name]
    base = ARCHITECTURES[whole].build()
    base.save_pretrained(folder / "base")
    part_class = type(base.get_submodule(path)) if settings is None else getattr(transformers, class_name)
    part = part_class(base.config if settings is None else getattr(base.config, settings)).eval()
    part.base_model.load_state_dict(base.get_submodule(path).state_dict())
    if hasattr(part, "lm_head"):
        part.lm_head.load_state_dict(base.lm_head.state_dict())
    fine_tuned(part, copy.deepcopy(part), 1).save_pretrained(folder / "expert")
    taken = next(names for key, names in TAKES.items() if key in name.split(" of ")[0])
    batches = [{key: batch[key] for key in taken} for batch in ARCHITECTURES[whole].batches()]
    if "input_ids" in taken:
        batches = [{**batch, "input_ids": batch["input_ids"] % 20} for batch in batches]
    return class_name, batches


def _quantize(folder: Path, made: str, method: str, batches: Any, opened: dict[str, bool | str]) -> None:
    """Quantize at 4 bits; `opened` is told whether plain transformers opens the packed model, and in which dtype."""
    experts = [{"name": "one", "model": str(folder / "expert")}]
    recipe: dict[str, Any] = {"base": str(folder / "base"), "experts": experts, "quantize": {"method": method}}
    data = None if method == "rtn" else {"one": batches}
    plain, packed = folder / f"{method}-plain", folder / f"{method}-packed"
    epmq.run({**recipe, "format": "dequantized", "output": str(plain)}, calibration=data, **QUIET)
    report = epmq.run({**recipe, "output": str(packed)}, calibration=data, **QUIET)
    reference = epmq.load(plain).backbone
    apart = gaps(epmq.load(packed).backbone, reference, batches)
    opened["opens"] = not any("from_pretrained cannot open" in note for note in report["notes"])
    if opened["opens"] and hasattr(transformers, made):
        direct = getattr(transformers, made).from_pretrained(packed).eval()
        theirs = gaps(direct, reference, batches)
        if TOLERANCE < max(theirs.values()) <= HALF:
            opened["opens"] = "in float16"
        else:
            apart |= {f"{name} of transformers": gap for name, gap in theirs.items()}
    wrong = [f"{name} off by {gap:.2g}" for name, gap in apart.items() if not gap <= TOLERANCE]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def main(arguments: Sequence[str] | None = None) -> None:
    """Try all families, or those named, and write what became of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("families", nargs="*", help="names in tests.kit.architectures, or parts; by default all")
    names = parser.parse_args(arguments).families or [*ARCHITECTURES, *PARTS]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    console, earlier = Console(), json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    rows = {row["family"]: row for row in earlier}
    for name in names:
        with TemporaryDirectory() as folder:
            rows[name] = try_family(name, Path(folder))
        console.print({key: str(value)[:90] for key, value in rows[name].items()})
    order = [name for name in (*ARCHITECTURES, *PARTS) if name in rows]
    write_json(PATH, {"rows": [rows[name] for name in order], **provenance()})


if __name__ == "__main__":
    main()
