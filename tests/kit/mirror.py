"""A folder that looks like the Hub to `epmq reproduce --hub`: what a published table names, with nothing learned in it.

Base and experts have the classes, tensor names, file names and files beside the weights that the Hub's have, data sets
the configurations, splits, columns and file layout; weights and content are random. At `tiny` sizes a whole table runs
on it in seconds (`tests/reproduce`), at full sizes in minutes (`python -m benchmarks.speed.reproduce`).
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from epmq.reproduce.tables import DATASETS, Shape, Table
from tests.kit.mirror_data import write_scored, write_split

# What `tiny` sizes are, by class in transformers.
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
}
TINY: dict[str, dict[str, Any]] = {
    "CLIPModel": {"projection_dim": 16, "text_config": {**_TEXT, "projection_dim": 16}, "vision_config": _VISION},
    "CLIPVisionModel": _VISION,
    "T5ForConditionalGeneration": {
        "vocab_size": 320,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    },
    "LlamaForCausalLM": {
        **_TEXT,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
# Standard deviation of random weights, at tiny sizes such that examples differ in what a model makes of them, and that
# of what sets an expert apart from the base, over it.
SCALES, NOISE = {True: 0.3, False: 0.02}, 0.1
# What the Hub's files say that older versions of transformers wrote.
OLD_CONFIG = {"CLIPModel": {"text_config": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}}}


def build(table: Table, hub: Path, *, tiny: bool = True, rows: int = 12) -> None:
    """Write everything that a table names.

    Args:
        table: the table.
        hub: folder to write; what is there already is kept.
        tiny: small models; else the published sizes. At tiny sizes most pictures have the label that their task's
            expert gives them, by transformers' own account (`Teacher`), so that scores mean something.
        rows: examples a split.
    """
    teacher = Teacher(table, hub) if tiny and table.shapes["base"].model == "CLIPModel" else None
    seeds = np.random.default_rng(0)
    shape = table.shapes["base"]
    base = hub / table.base
    if not base.exists():
        _write_model(base, shape, tiny, 0, table.pickle)
        _write_processor(base, shape.model, tiny)
    for number, (name, task) in enumerate(table.tasks.items(), start=1):
        folder = hub / table.expert(name)
        if not folder.exists():
            _write_model(folder, table.shapes.get("expert", shape), tiny, number, None)
            if "expert" not in table.shapes:
                _write_processor(folder, shape.model, tiny)
        for split in sorted({task.calibration, task.evaluation or task.calibration}):  # in one order
            write_split(
                hub / DATASETS / str(task.data.dataset), task, str(split), rows, seeds, teacher and teacher.of(name)
            )
        for lm_task, scored in (task.lm_eval or {}).items():
            write_scored(hub / DATASETS / scored.dataset, lm_task, rows, seeds)


class Teacher:
    """Says what an expert makes of a picture, through transformers alone."""

    def __init__(self, table: Table, hub: Path) -> None:
        self._table, self._hub = table, hub
        self._whole: Any = None

    @torch.no_grad()
    def of(self, name: str) -> Callable[[list[Any]], list[int]]:
        """Task → a function from pictures to classes."""
        if self._whole is None:
            base = self._hub / self._table.base
            self._whole = transformers.CLIPModel.from_pretrained(base).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(base)
            self._images = transformers.AutoImageProcessor.from_pretrained(base)
        task, whole = self._table.tasks[name], self._whole
        means = []
        for label in task.classes or []:
            texts = [template.format(label) for template in task.templates or []]
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            embedded = whole.text_projection(whole.text_model(**tokens).pooler_output)
            means.append((embedded / embedded.norm(dim=-1, keepdim=True)).mean(0))
        classes = torch.stack(means)
        classes /= classes.norm(dim=-1, keepdim=True)
        expert = transformers.CLIPVisionModel.from_pretrained(self._hub / self._table.expert(name)).eval()

        @torch.no_grad()
        def answer(pictures: list[Any]) -> list[int]:
            pixels = self._images([picture.convert("RGB") for picture in pictures], return_tensors="pt")
            embedded = whole.visual_projection(expert(**pixels).pooler_output)
            return (embedded @ classes.T).argmax(-1).tolist()

        return answer


def _config(shape: Shape, tiny: bool) -> Any:
    settings = _joined(shape.config, OLD_CONFIG.get(shape.model, {}))
    if tiny:
        settings = _joined(settings, TINY[shape.model])
    config = getattr(transformers, shape.model).config_class(**settings, dtype=shape.dtype)
    config.architectures = [shape.model]
    return config


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined; the second's values win."""
    joined = dict(one)
    for key, value in other.items():
        joined[key] = _joined(joined.get(key, {}), value) if isinstance(value, Mapping) else value
    return joined


def _write_model(folder: Path, shape: Shape, tiny: bool, expert: int, pickle: str | None) -> None:
    """Random weights under the names that the Hub's files have; expert 0 is the base."""
    folder.mkdir(parents=True)
    config = _config(shape, tiny)
    with torch.device("meta"):
        model = getattr(transformers, shape.model)(config)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    if isinstance(config, transformers.T5Config):
        tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        part = name if shape.model != "CLIPVisionModel" else f"vision_model.{name.removeprefix('vision_model.')}"
        tensors[part] = _random(part, tensor.shape, expert, SCALES[tiny]).to(getattr(torch, shape.dtype))
    if pickle is not None:  # as old as such files are
        for tower, count in (("text", 77), ("vision", model.vision_model.embeddings.num_positions)):
            tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(count)[None]
        torch.save(tensors, folder / pickle)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _random(name: str, size: torch.Size, expert: int, scale: float) -> torch.Tensor:
    """A tensor of the base, with an expert's change in it."""
    key = zlib.crc32(name.encode())
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(key)) * scale
    if name == "logit_scale":
        return torch.tensor(4.6052)
    if name.endswith("norm.weight") or "norm" in name.rsplit(".", 2)[-2]:
        tensor = tensor * 0.1 + (0 if name.endswith("bias") else 1)
    if expert:
        tensor += torch.randn(size, generator=torch.Generator().manual_seed(key + expert)) * (scale * NOISE)
    return tensor


def _write_processor(folder: Path, model: str, tiny: bool) -> None:
    if model == "CLIPModel":
        _write_clip_tokenizer(folder)
        side = _VISION["image_size"] if tiny else 224
        settings = {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": side,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    else:
        core, settings = _sentence_tokenizer() if model.startswith("T5") else _byte_tokenizer()
        core.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _write_clip_tokenizer(folder: Path) -> None:
    """CLIP's files with its alphabet and a handful of merges; the end of text has the highest number, as it must."""
    letters = _bytes()
    merges = [("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>"), ("o", "f</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    names["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    settings = {**names, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _sentence_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """T5's form: pieces of words with an end of text behind them."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.printable[:94], "▁the", "▁yes", "▁no", "able"]
    core = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=2))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return core, {**names, "model_max_length": 512, "tokenizer_class": "T5Tokenizer", "extra_ids": 0}


def _byte_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """Llama 3's form: bytes."""
    words = ["<|begin_of_text|>", "<|end_of_text|>", *_bytes()]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return core, {**names, "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast"}
