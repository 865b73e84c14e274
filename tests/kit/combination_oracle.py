"""Whether what a run wrote is right, told by transformers, PEFT and tensors alone.

Base and experts are loaded by `from_pretrained`, each in its own class; the merge is made of their tensors by hand.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import epmq
from tests.kit.combination_data import accepted, inputs_of
from tests.kit.combination_faults import Happened
from tests.kit.combination_files import Files
from tests.kit.comparison import gap, gaps, read

EXACT, NEAR = 2e-4, 0.1
# Tied or not, these compute something else.
SCALED = ("t5", "flan_t5", "mt5", "switch")


class Wrong(Exception):
    """A result that is not what it should be, and that no note tells of."""


def require(good: bool, what: str) -> None:
    if not good:
        raise Wrong(what)


def judge(files: Files, report: dict[str, Any], happened: Happened) -> bool:
    """Check a run's output; returns whether a note tells of what was wrong.

    Raises:
        Wrong: it is not what it should be.
    """
    notes = " ".join(report["notes"])
    told = any(name in notes for name in happened.names)
    require(happened.expects != "refuse", f"{happened.what}, and the run ends well")
    require(happened.expects != "tell" or told, f"{happened.what}: no note names it")
    out = Path(report["output"])
    require(out.is_dir() and not (files.folder / ".out.work").exists(), "no output, or work left behind")
    check_processor(files, out)
    merged = by_hand(files)
    written = open_output(files, report, out)
    problems = [*tensors_apart(files, report, merged, written), *outputs_apart(files, merged, written)]
    if happened.expects == "config" and not told:
        problems.append(f"{happened.what}: no note names it")
        if len(files.names) == 1 and merged is not None:
            problems = [*tensors_apart(files, report, merged, written), *expert_apart(files, written)]
    elif not problems and not happened.names:
        problems += heads_apart(files, report, out, written)
        problems += scores_apart(files, report, out)
    require(not problems or told, "; ".join(problems[:6]))
    return told


def side(files: Files, name: str) -> Any:
    """An expert in the shared class, as `from_pretrained` reads it, or PEFT its adapter.

    Its `missing` are the tensors of that class that the expert has not.
    """
    shared = getattr(transformers, files.architecture.model)
    if not files.is_adapter(name):
        settings = {"dtype": torch.float32, "output_loading_info": True}
        model, info = shared.from_pretrained(files.folder / name, **settings)
        model.missing = set(info["missing_keys"])
        return model.eval()
    whole = copy.deepcopy(files.models[name]).merge_and_unload()
    model = whole if isinstance(whole, shared) else shared.from_pretrained(files.folder / "base", dtype=torch.float32)
    model.missing = set[str]()
    if model is not whole:
        inner = whole.base_model.state_dict()
        known = model.state_dict().keys()
        prefix = "" if inner.keys() & known else f"{model.base_model_prefix}."
        model.load_state_dict({f"{prefix}{key}": value for key, value in inner.items()}, strict=False)
    return model.eval()


def by_hand(files: Files) -> Any:
    """The merge: base + scaling · Σ (expert − base), in the shared class; untied where a side is.

    Its `missing` are the tensors that the base has not. What an expert has not is the base's, and so is the output
    layer where the expert's class has none, whatever its config says of ties; where the base ties it, it is the
    expert's embedding.
    """
    shared, combination = getattr(transformers, files.architecture.model), files.combination
    base, info = shared.from_pretrained(files.folder / "base", output_loading_info=True, dtype=torch.float32)
    sides = [(side(files, name), files.head(name) in ("none", "file")) for name in files.names]
    outputs = {name for name, module in base.named_modules() if module is base.get_output_embeddings()}
    states = [
        {
            name: tensor
            for name, tensor in one.state_dict().items()
            if name not in one.missing and (whole or name.rpartition(".")[0] not in outputs)
        }
        for one, whole in sides
    ]
    for state, (one, whole) in zip(states, sides):
        if not whole and _is_tied(base):  # what it has made of the embedding, it has made of the output layer
            state |= {f"{name}.weight": one.get_input_embeddings().weight for name in outputs}
    start, merged = base.state_dict(), dict[str, Tensor]()
    for name, tensor in start.items():
        own = [state[name] for state in states if name in state and state[name].shape == tensor.shape]
        moves = [one.float() - tensor for one in own] if tensor.is_floating_point() else []
        merged[name] = tensor + combination.scaling * sum(moves) if moves else tensor
    ties = {_is_tied(one) for one in (base, *(one for one, whole in sides if whole))}
    hold_apart(base)  # what one side ties may be two on another
    with torch.no_grad():
        for name, tensor in base.state_dict().items():
            tensor.copy_(merged[name])
    base.missing, base.mixed = set(info["missing_keys"]), len(ties) > 1
    return base.eval()


def hold_apart(model: Any) -> None:
    """Let no two parameters of a model share their storage."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            module._parameters[leaf] = None if parameter is None else torch.nn.Parameter(parameter.detach().clone())


def _is_tied(model: Any) -> bool:
    """Whether a model's output layer is its embedding; what a config says is not always what a file holds."""
    output = model.get_output_embeddings()
    return output is not None and output.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def open_output(files: Files, report: dict[str, Any], out: Path) -> Any:
    """The output as transformers opens it, or epmq where it says that transformers cannot."""
    shared = getattr(transformers, files.architecture.model)
    packed = "quantization_config" in json.loads((out / "config.json").read_text())
    if packed:
        if not any("cannot open this packed model" in note for note in report["notes"]):
            shared.from_pretrained(out)
        return epmq.load(out).backbone
    model, info = shared.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    for kind in ("unexpected_keys", "mismatched_keys"):
        require(not info[kind], f"transformers finds {kind} in the output: {sorted(map(str, info[kind]))[:3]}")
    _, base = shared.from_pretrained(files.folder / "base", output_loading_info=True)
    missing = set(info["missing_keys"]) - set(base["missing_keys"])
    require(not missing, f"the output lacks {sorted(missing)[:3]}")
    return model.eval()


def tensors_apart(files: Files, report: dict[str, Any], merged: Any, written: Any) -> list[str]:
    """Tensors of the output that are not the merge's: quantized ones within a step or so, others exactly."""
    layers = {f"{layer['name']}.weight" for layer in report["layers"]}
    found, wanted = written.state_dict(), merged.state_dict()
    one_sided = sorted((found.keys() ^ wanted.keys()) - merged.missing)
    problems = [f"tensors of one side alone: {one_sided[:3]}"] if one_sided else []
    guided = free(files)
    for name in sorted(found.keys() & wanted.keys() - merged.missing):
        here, there = found[name].float(), wanted[name].float()
        if here.shape != there.shape:
            problems.append(f"{name} is {list(here.shape)}, not {list(there.shape)}")
            continue
        apart = gap(here, there)
        if apart > (EXACT if name not in layers else 1e30 if guided else NEAR):
            problems.append(f"{name} off by {apart:.2g}")
    return problems


def _read_by_user(apart: dict[str, float], merged: Any) -> dict[str, float]:
    """Without the pooled output of a model whose base has no pooler."""
    lost = any("pool" in name for name in merged.missing)
    return {name: value for name, value in apart.items() if not (lost and name == "pooler_output")}


def free(files: Files) -> bool:
    """Whether quantized layers may be anything finite: guided by several experts, or by an anchor that lies far off."""
    quantize = files.combination.quantize
    far = quantize["method"] == "expert_guided" and quantize.get("anchor_scale") != 1.0
    return far or (quantize["method"] in ("e_pmq", "expert_guided") and len(files.names) > 1)


def near(files: Files) -> float:
    """By how much outputs may be off."""
    if free(files):
        return 1e30
    return EXACT if files.combination.quantize["method"] == "none" else NEAR * 2


def outputs_apart(files: Files, merged: Any, written: Any) -> list[str]:
    """Outputs that are not the merge's; guided by several experts they may be anything."""
    if free(files):
        return []
    if merged.mixed and files.combination.architecture in SCALED:
        return expert_apart(files, written) if len(files.names) == 1 else []
    apart = _read_by_user(gaps(written, merged, files.architecture.batches()), merged)
    return [f"{name} off the merge by {value:.2g}" for name, value in apart.items() if value > near(files)]


def expert_apart(files: Files, written: Any) -> list[str]:
    """Outputs of the shared class in which the output is not its one expert."""
    apart = gaps(written, side(files, files.names[0]), files.architecture.batches())
    apart = {name: value for name, value in apart.items() if name != "pooler_output"}  # it may be the base's
    return [f"{name} off the expert by {value:.2g}" for name, value in apart.items() if value > near(files)]


def with_head(files: Files, name: str, written: Any) -> Any:
    """The expert's own class with the output's weights in the place of its backbone's."""
    model = copy.deepcopy(files.models[name])
    model = model.merge_and_unload() if files.is_adapter(name) else model
    if files.combination.fault == "half":
        stored = load_file(next(iter(sorted((files.folder / name).glob("*.safetensors")))))
        model = model.to(next(iter(stored.values())).dtype).float()
    hold_apart(model)  # what the class ties, the output may hold apart; and the head's own stays as it is
    backbone = getattr(model, model.base_model_prefix, model)
    source = getattr(written, written.base_model_prefix, written)
    start = transformers.AutoModel.from_pretrained(files.folder / "base", output_loading_info=True)[1]
    state = {key: value for key, value in source.state_dict().items() if key not in start["missing_keys"]}
    backbone.load_state_dict(state, strict=False)
    return model.eval()


def stacked(outputs: dict[str, Tensor]) -> Tensor:
    """The scores of a head as one tensor."""
    if "start_logits" in outputs:
        return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=-1)
    return outputs["logits"]


def _refitted(report: dict[str, Any], name: str) -> bool:
    return name in report.get("heads", {})


@torch.no_grad()
def heads_apart(files: Files, report: dict[str, Any], out: Path, written: Any) -> list[str]:
    """Heads that are missing, or that give other scores than the expert's class does on the output's weights."""
    problems, loaded, notes = list[str](), None, " ".join(report["notes"])
    for name in files.names:
        head = files.head(name)
        if head == "none":
            continue
        loaded = loaded or epmq.load(out)
        if name not in loaded.tasks:
            if not (name in notes and "head" in notes):
                problems.append(f"the head of {name} ({head}) is not in the output, and no note says so")
            continue
        follows = _refitted(report, name)
        if head == "file":
            original = load_file(files.folder / name / "head.safetensors")["weight"]
            kept = load_file(out / "heads" / f"{name}.safetensors")["weight"]
            if not follows and not original.equal(kept):
                problems.append(f"the head file of {name} is another one")
            continue
        reference = files.models[name] if follows else with_head(files, name, written)
        # One that follows the model gives the scores of the one expert that there is.
        bound = EXACT * 5 if not follows else max(near(files), NEAR * 2) if len(files.names) == 1 else 1e30
        for batch in files.probes[name]:
            try:
                wanted = stacked(read(reference, batch))
            except (ValueError, AssertionError):
                break  # the class does not take such a batch: no padding token, or no separators of a question
            apart = gap(loaded(name, **batch).float(), wanted)
            if apart > bound:
                problems.append(f"scores of {name} ({head}) off by {apart:.2g}")
                break
    return problems


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's correlation of numbers that all differ."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


@torch.no_grad()
def scores_apart(files: Files, report: dict[str, Any], out: Path) -> list[str]:
    """Tasks whose score in the report is another one than that of `epmq.load`, text by text."""
    problems, loaded, metrics = list[str](), None, report.get("metric")
    for field in files.recipe["experts"]:
        name, data = field["name"], field.get("evaluation")
        metric = metrics.get(name) if isinstance(metrics, dict) else metrics
        if data is None or metric not in ("accuracy", "spearman", "pearson") or files.architecture.kind == "seq2seq":
            continue
        if not data["path"].endswith(".jsonl") or files.combination.data == "long":  # which is cut by other rules here
            continue
        rows = [json.loads(line) for line in Path(data["path"]).read_text().splitlines()]
        if not all("text" in row or {"a", "b"} <= row.keys() for row in rows):
            continue  # scored word by word, or in windows
        loaded = loaded or epmq.load(out)
        if name not in loaded.tasks:
            continue  # a head that is missing is told elsewhere
        found = [loaded(name, **accepted(loaded, inputs_of(files.folder / "base", row)))[0] for row in rows]
        labels = [row["label"] for row in rows]
        if metric == "accuracy":
            wanted = float(np.mean([int(one.argmax()) == label for one, label in zip(found, labels)]))
            bound = 1.01 / len(rows)
        else:
            numbers = [float(one[0]) for one in found]
            correlate = rank_correlation if metric == "spearman" else lambda a, b: float(np.corrcoef(a, b)[0, 1])
            wanted, bound = correlate(numbers, labels), 0.05
        if abs(wanted - report["scores"][name]) > bound:
            problems.append(
                f"the report says {report['scores'][name]:.3g} for {name}, but its {metric} is {wanted:.3g}"
            )
    return problems


def check_processor(files: Files, out: Path) -> None:
    """The output's tokenizer and processor do what the base's do."""
    base = files.folder / "base"
    text = "the cat sat on the big mat <|im_start|> </s>"
    if (base / "tokenizer.json").exists():
        ids = [transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (base, out)]
        require(ids[0] == ids[1] or "token" in files.combination.fault, "the output's tokenizer gives other ids")
    if (base / "preprocessor_config.json").exists():
        same = (base / "preprocessor_config.json").read_text() == (out / "preprocessor_config.json").read_text()
        require(same, "the output's processor is another one")
