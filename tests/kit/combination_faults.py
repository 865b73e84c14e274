"""What is wrong with a combination: one thing, done to files that are good, and what a run must make of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kit.combination_files import Files, write_tokenizer
from tests.kit.comparison import gaps

INDEX = "model.safetensors.index.json"
# Fields of configs that change what is computed, and what to change them to.
FIELDS: dict[str, Any] = {
    "rms_norm_eps": 0.5,
    "layer_norm_eps": 0.5,
    "layer_norm_epsilon": 0.5,
    "hidden_act": "relu",
    "activation_function": "relu",
    "num_attention_heads": 2,
    "sliding_window": 2,
    "attention_multiplier": 0.9,
    "logit_scale": 0.9,
    "embedding_multiplier": 3.0,
    "scale_embedding": True,
    "feed_forward_proj": "gelu",
    "local_attention": 2,
    "rope_theta": 10.0,
}


@dataclass(frozen=True)
class Happened:
    """What was done: nothing, where the combination has nothing to do it to.

    Attributes:
        what: in words; empty for nothing.
        expects: `refuse` (there must be no output), `tell` (a note must name one of `names`), `config` (as `tell`,
            unless the output is the expert) or `right` (it makes no difference).
    """

    what: str = ""
    expects: str = "right"
    names: tuple[str, ...] = ()


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def edit_weights(folder: Path, change: Change) -> None:
    """Put other tensors into a checkpoint of one file or several; what is added goes into the first."""
    files = sorted(folder.glob("model*.safetensors"))
    where = {name: file for file in files for name in load_file(file)}
    tensors = change({name: tensor for file in files for name, tensor in load_file(file).items()})
    for file in files:
        own = {name: t.contiguous() for name, t in tensors.items() if where.get(name, files[0]) == file}
        save_file(own, file, metadata={"format": "pt"})
    index = folder / INDEX
    if index.exists():
        mapping = {name: where.get(name, files[0]).name for name in tensors}
        index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; those that are None are taken out."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def names_in(folder: Path) -> list[str]:
    return [name for file in sorted(folder.glob("model*.safetensors")) for name in load_file(file)]


def _is_inside(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _inside(folder: Path) -> list[str]:
    """Weights of the blocks' layers."""
    return [name for name in names_in(folder) if name.endswith(".weight") and _is_inside(name)]


def _layers(folder: Path) -> list[str]:
    tensors = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    return sorted(name for name in _inside(folder) if tensors[name].ndim == 2)


class Pick:
    """A seeded choice for a combination, and the expert that something is done to."""

    def __init__(self, files: Files) -> None:
        self.rng = random.Random(files.combination.number)
        self.name = files.names[0]
        self.folder = files.folder / self.name
        self.base = files.folder / "base"
        self.full = not files.is_adapter(self.name)


def _extra(files: Files, pick: Pick) -> Happened:
    """A tensor in the blocks that the base lacks, as of another config."""
    name = pick.rng.choice(_layers(pick.folder))
    taken = names_in(pick.folder)
    new = name.replace(".weight", ".bias")
    new = new if new not in taken else name.replace(".weight", ".q_norm.weight")
    edit_weights(pick.folder, lambda tensors: tensors | {new: torch.randn(len(tensors[name]))})
    return Happened(f"expert's extra {new}", "tell", (new.rpartition(".")[0].rpartition(".")[2],))


def _lora_left(files: Files, pick: Pick) -> Happened:
    layer = pick.rng.choice(_layers(pick.folder)).removesuffix(".weight")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = tensors[f"{layer}.weight"].shape
        return tensors | {f"{layer}.lora_A": torch.randn(2, columns), f"{layer}.lora_B": torch.randn(rows, 2)}

    edit_weights(pick.folder, change)
    return Happened(f"expert's {layer}.lora_A and lora_B", "tell", ("lora_",))


def _stray(files: Files, pick: Pick) -> Happened:
    edit_weights(pick.folder, lambda tensors: tensors | {"extra_projection.weight": torch.randn(4, 4)})
    return Happened("expert's extra_projection.weight", "tell", ("extra_projection",))


def _base_stray(files: Files, pick: Pick) -> Happened:
    edit_weights(pick.base, lambda tensors: tensors | {"extra_projection.weight": torch.randn(4, 4)})
    return Happened("base's extra_projection.weight", "tell", ("extra_projection",))


def _config(files: Files, pick: Pick) -> Happened:
    """Another field in the expert's config, if that changes what the expert computes."""
    path = pick.folder / "config.json"
    content = json.loads(path.read_text())
    there = [name for name in FIELDS if name in content and content[name] != FIELDS[name]]
    if "rope_parameters" in content and isinstance(content["rope_parameters"], dict):
        there.append("rope_theta")
    if not there:
        return Happened()
    field = pick.rng.choice(there)
    kind = type(files.models[pick.name])
    before = kind.from_pretrained(pick.folder)
    value: Any = {field: FIELDS[field]}
    if field == "rope_theta" and field not in content:
        value = {"rope_parameters": {**content["rope_parameters"], "rope_theta": 10.0}}
    edit_json(path, **value)
    try:
        after = kind.from_pretrained(pick.folder)
    except (RuntimeError, ValueError):
        return Happened(f"expert's config has another {field}, which its own weights do not fit", "refuse")
    probes = files.probes[pick.name]
    if max(gaps(after.eval(), before.eval(), probes).values()) < 1e-4:
        path.write_text(json.dumps(content))
        return Happened()
    return Happened(f"expert's config has another {field}", "config", (field, "rope"))


def _tensor_missing(files: Files, pick: Pick) -> Happened:
    name = pick.rng.choice(_inside(pick.folder))
    edit_weights(pick.folder, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    return Happened(f"expert lacks {name}", "tell", (name.split(".", 1)[1],))


def _base_tensor_missing(files: Files, pick: Pick) -> Happened:
    name = pick.rng.choice(_inside(pick.base))
    edit_weights(pick.base, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    return Happened(f"base lacks {name}", "tell", (name.split(".", 1)[1],))


def _outside_missing(files: Files, pick: Pick) -> Happened:
    names = [name for name in names_in(pick.folder) if not _is_inside(name) and name in names_in(pick.base)]
    if not names:
        return Happened()
    name = pick.rng.choice(names)
    edit_weights(pick.folder, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    return Happened(f"expert lacks {name}", "tell", (name,))


def _nan(files: Files, pick: Pick) -> Happened:
    name = pick.rng.choice(_layers(pick.folder))

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[0] = float("nan")
        return tensors

    edit_weights(pick.folder, change)
    return Happened(f"expert's {name} has NaN", "refuse")


def _shape(files: Files, pick: Pick) -> Happened:
    name = pick.rng.choice(_layers(pick.folder))
    edit_weights(pick.folder, lambda tensors: tensors | {name: torch.cat([tensors[name], tensors[name][:1]])})
    return Happened(f"expert's {name} has another shape", "refuse")


def _prefix(files: Files, pick: Pick) -> Happened:
    prefix = pick.rng.choice(("module.", "_orig_mod.", "wrapped."))
    edit_weights(pick.folder, lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()})
    return Happened(f"expert's tensors begin with {prefix}", "tell", (prefix.rstrip("."),))


def _file(files: Files, pick: Pick) -> Happened:
    paths = [pick.base / "config.json", *pick.base.glob("model*"), *pick.folder.glob("*model*.safetensors")]
    paths += [pick.folder / ("config.json" if pick.full else "adapter_config.json")]
    path = pick.rng.choice(sorted(paths))
    path.unlink()
    return Happened(f"no file {path.relative_to(files.folder)}", "refuse")


def _data_file(files: Files, pick: Pick) -> Happened:
    fields = files.recipe["experts"][0]
    used = [fields[use] for use in ("calibration", "evaluation") if use in fields]
    if not used:
        return Happened()
    Path(used[0]["path"]).unlink()
    return Happened("no data file", "refuse")


def _no_tokenizer(files: Files, pick: Pick) -> Happened:
    gone = [*pick.base.glob("tokenizer*"), *pick.base.glob("chat_template*"), *pick.base.glob("preprocessor_config*")]
    for path in gone:
        path.unlink()
    needed = any(use in files.recipe["experts"][0] for use in ("calibration", "evaluation"))
    return Happened("base has no tokenizer or processor", "refuse" if needed else "right")


def _added_tokens(files: Files, pick: Pick) -> Happened:
    if not (pick.base / "tokenizer.json").exists():
        return Happened()
    write_tokenizer(pick.folder, ("<|im_start|>", "<|im_end|>"))
    return Happened("expert's tokenizer has more tokens", "tell", ("token", "<|im_start|>"))


def _grown(files: Files, pick: Pick) -> Happened:
    """Tokens that have no row in the base's embeddings."""
    kind, model = type(files.models[pick.name]), files.models[pick.name]
    if (
        not pick.full
        or not (pick.base / "tokenizer.json").exists()
        or files.architecture.kind not in ("encoder", "decoder")
    ):
        return Happened()
    try:
        model = kind.from_pretrained(pick.folder)
        model.resize_token_embeddings(36, mean_resizing=False)
        for old in pick.folder.glob("model*"):
            old.unlink()
        model.save_pretrained(pick.folder)
    except (NotImplementedError, ValueError, AttributeError):
        return Happened()
    write_tokenizer(pick.folder, tuple(f"<new{index}>" for index in range(14)))
    return Happened("expert's embeddings have more rows", "tell", ("token", "<new0>", "rows"))


def _renumbered(files: Files, pick: Pick) -> Happened:
    path = pick.base / "tokenizer.json"
    if not path.exists():
        return Happened()
    write_tokenizer(pick.folder)
    content = json.loads((pick.folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    words = list(vocabulary)[6:]
    content["model"]["vocab"] = vocabulary | dict(zip(words, [vocabulary[word] for word in reversed(words)]))
    (pick.folder / "tokenizer.json").write_text(json.dumps(content))
    return Happened("expert's tokenizer numbers words otherwise", "tell", ("token",))


def _head_missing(files: Files, pick: Pick) -> Happened:
    head = files.head(pick.name)
    if head in ("none", "file"):
        return Happened()
    if pick.full:
        inner = set(names_in(pick.base))
        prefix = files.models[pick.name].base_model_prefix
        own = [name for name in names_in(pick.folder) if name not in inner and not name.startswith(f"{prefix}.")]
        if not own:
            return Happened()
        edit_weights(pick.folder, lambda tensors: {name: value for name, value in tensors.items() if name not in own})
        return Happened(f"expert's head lacks {own[0]}", "tell", ("head", own[0]))
    path = pick.folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if ".lora_" in name}
    save_file(kept, path)
    edit_json(pick.folder / "adapter_config.json", modules_to_save=None)
    return Happened("adapter brings no head", "tell", ("head",))


def _no_class(files: Files, pick: Pick) -> Happened:
    edit_json(pick.base / "config.json", architectures=None)
    return Happened("base's config names no class")


def _old_class(files: Files, pick: Pick) -> Happened:
    name = json.loads((pick.base / "config.json").read_text())["architectures"][0]
    edit_json(pick.base / "config.json", architectures=[f"Old{name}"])
    return Happened("base's config names an old class")


def _half(files: Files, pick: Pick) -> Happened:
    dtype = pick.rng.choice((torch.bfloat16, torch.float16))
    edit_weights(
        pick.folder, lambda tensors: {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    )
    edit_json(pick.folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return Happened(f"expert is stored in {dtype}")


def _pickle(files: Files, pick: Pick) -> Happened:
    if files.combination.sharded:
        return Happened()
    torch.save(load_file(pick.folder / "model.safetensors"), pick.folder / "pytorch_model.bin")
    (pick.folder / "model.safetensors").unlink()
    return Happened("expert is a pickle", "refuse")


def _strange(files: Files, pick: Pick) -> Happened:
    edit_weights(
        pick.folder,
        lambda tensors: {name: torch.randn_like(t) * t.std() if t.ndim == 2 else t for name, t in tensors.items()},
    )
    return Happened("expert is no fine-tune of the base", "refuse")


FULL: dict[str, Callable[[Files, Pick], Happened]] = {
    "extra": _extra,
    "lora_left": _lora_left,
    "stray": _stray,
    "config": _config,
    "tensor_missing": _tensor_missing,
    "outside_missing": _outside_missing,
    "nan": _nan,
    "shape": _shape,
    "prefix": _prefix,
    "half": _half,
    "pickle": _pickle,
    "strange": _strange,
}
ANY: dict[str, Callable[[Files, Pick], Happened]] = {
    "base_stray": _base_stray,
    "base_tensor_missing": _base_tensor_missing,
    "file": _file,
    "data_file": _data_file,
    "no_tokenizer": _no_tokenizer,
    "added_tokens": _added_tokens,
    "grown": _grown,
    "renumbered": _renumbered,
    "head_missing": _head_missing,
    "no_class": _no_class,
    "old_class": _old_class,
}
FAULTS = {**FULL, **ANY, "config2": _config}


def apply_fault(files: Files) -> Happened:
    """Do to the files what the combination says is wrong; what is for full checkpoints is not done to adapters."""
    fault, pick = files.combination.fault, Pick(files)
    if fault == "none" or (fault not in ANY and not pick.full):
        return Happened()
    return FAULTS[fault](files, pick)
