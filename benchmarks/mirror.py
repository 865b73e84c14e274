"""A folder that looks like the Hub to `epmq reproduce --hub`: what a published table names, with nothing learned in it.

Base and experts have the classes, tensor names, file names and files beside the weights that the Hub's have, data sets
the configurations, splits, columns and file layout; weights and content are random. At `tiny` sizes a whole table runs
on it in seconds (`tests/test_reproduce.py`), at full sizes in minutes (`python -m benchmarks.reproduce`).
"""

from __future__ import annotations

import io
import json
import string
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from epmq.reproduce.tables import DATASETS, Shape, Table, Task

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
SIDE = 24  # of a picture, in pixels
Answer = Callable[[list[Any]], list[int]]


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
            place = hub / DATASETS / str(task.data.dataset)
            _write_split(place, task, str(split), rows, seeds, teacher and teacher.of(name))
        for lm_task, scored in (task.lm_eval or {}).items():
            _write_scored(hub / DATASETS / scored.dataset, lm_task, rows, seeds)


class Teacher:
    """Says what an expert makes of a picture, through transformers alone."""

    def __init__(self, table: Table, hub: Path) -> None:
        self._table, self._hub = table, hub
        self._whole: Any = None

    @torch.no_grad()
    def of(self, name: str) -> Callable[[list[Any]], list[int]]:
        """Task → a function from pictures to classes."""
        if self._whole is None:
            place = self._hub / self._table.base
            self._whole = transformers.CLIPModel.from_pretrained(place).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            self._images = transformers.AutoImageProcessor.from_pretrained(place)
        task, whole = self._table.tasks[name], self._whole
        means = []
        for label in task.classes or []:
            texts = [template.format(label) for template in task.templates or []]
            found = whole.text_model(
                **self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            ).pooler_output
            found = whole.text_projection(found)
            means.append((found / found.norm(dim=-1, keepdim=True)).mean(0))
        classes = torch.stack(means)
        classes /= classes.norm(dim=-1, keepdim=True)
        expert = transformers.CLIPVisionModel.from_pretrained(self._hub / self._table.expert(name)).eval()

        @torch.no_grad()
        def answer(pictures: list[Any]) -> list[int]:
            pixels = self._images([picture.convert("RGB") for picture in pictures], return_tensors="pt")
            seen = whole.visual_projection(expert(**pixels).pooler_output)
            return (seen @ classes.T).argmax(-1).tolist()

        return answer


def _config(shape: Shape, tiny: bool) -> Any:
    wanted = _joined(shape.config, OLD_CONFIG.get(shape.model, {}))
    if tiny:
        wanted = _joined(wanted, TINY[shape.model])
    kind = getattr(transformers, shape.model)
    config = kind.config_class(**wanted, dtype=shape.dtype)
    config.architectures = [shape.model]
    return config


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined; the second's values win."""
    found = dict(one)
    for key, value in other.items():
        found[key] = _joined(found.get(key, {}), value) if isinstance(value, Mapping) else value
    return found


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
    found = torch.randn(size, generator=torch.Generator().manual_seed(key)) * scale
    if name == "logit_scale":
        return torch.tensor(4.6052)
    if name.endswith("norm.weight") or "norm" in name.rsplit(".", 2)[-2]:
        found = found * 0.1 + (0 if name.endswith("bias") else 1)
    if expert:
        found += torch.randn(size, generator=torch.Generator().manual_seed(key + expert)) * (scale * NOISE)
    return found


def _write_processor(folder: Path, kind: str, tiny: bool) -> None:
    if kind == "CLIPModel":
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
        core, settings = _sentence_tokenizer() if kind.startswith("T5") else _byte_tokenizer()
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


def _write_split(
    folder: Path, task: Task, split: str, rows: int, random: np.random.Generator, answer: Answer | None
) -> None:
    """One split of a data set: parquet files, or for pictures named after their endings a webdataset."""
    import datasets

    subset = task.data.subset
    if task.data.image == "jpg":
        _write_archive(folder / split / "0.tar", task, rows, random, answer)
        return
    features, content = _columns(task, rows, random, answer)
    _write_rows(folder, subset, split, datasets.Dataset.from_dict(content, features=features))


def _write_rows(folder: Path, subset: str | None, split: str, rows: Any) -> None:
    """One split as parquet; the card of a data set with configurations says which files are whose."""
    from pyarrow import parquet

    place = folder / (subset or "data")
    file = place / f"{split}-00000-of-00001.parquet"
    if file.exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows.with_format("arrow")[:], file)
    if subset:
        listed = {found.name for found in folder.iterdir() if found.is_dir()}
        configs = [
            {
                "config_name": name,
                "data_files": [
                    {"split": found.name.split("-")[0], "path": f"{name}/{found.name}"}
                    for found in sorted((folder / name).glob("*.parquet"))
                ],
            }
            for name in sorted(listed)
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def _write_scored(folder: Path, lm_task: str, rows: int, random: np.random.Generator) -> None:
    """The data of one of lm-eval's tasks: the columns that its definition reads."""
    import datasets

    kind, _, language = lm_task.rpartition("_")
    letters = ["A", "B", "C", "D"]

    def row(number: int) -> dict[str, Any]:
        said = {name: _sentence(random) for name in ("question", "instruction", "ctx_a", "ctx_b", "activity_label")}
        options = {f"option_{letter.lower()}": _sentence(random) for letter in letters}
        picked = {"id": str(number), "answer": str(random.choice(letters))}
        if kind == "m_mmlu":
            return {"instruction": said["instruction"], **options, **picked}
        if kind == "arc":
            return {"instruction": said["instruction"], **options, "option_e": None, **picked}
        if kind == "hellaswag":
            asked = {name: said[name] for name in ("ctx_a", "ctx_b", "activity_label")}
            return {**asked, "endings": list(options.values()), "label": str(random.integers(0, 4))}
        if kind == "gsm8k":
            return {"question": said["question"], "answer": f"{_sentence(random)}\n#### {random.integers(0, 100)}"}
        ways = ["punctuation:no_comma", "change_case:english_lowercase"]
        return {
            "key": number,
            "prompt": said["question"],
            "instruction_id_list": ways,
            "kwargs": [{"prompt_to_repeat": ""}] * 2,
        }

    subset = {"gsm8k": "main", "": None}.get(kind, language)
    for split in {"gsm8k": ["train", "test"], "hellaswag": ["val"], "": ["train"]}.get(kind, ["train", "val", "test"]):
        _write_rows(folder, subset, split, datasets.Dataset.from_list([row(number) for number in range(rows)]))


def _columns(
    task: Task, rows: int, random: np.random.Generator, answer: Answer | None
) -> tuple[Any, dict[str, list[Any]]]:
    import datasets

    data, named = task.data, datasets.Value("string")
    if task.classes is not None:
        pictures = [_picture(random) for _ in range(rows)]
        labels = _labels(pictures, len(task.classes), random, answer)
        kind: Any = datasets.ClassLabel(names=list(task.classes))
        if len(task.classes) == 2 and "pcam" in str(data.dataset).lower().replace("patchcamelyon", "pcam"):
            kind, labels = datasets.Value("bool"), [bool(label) for label in labels]
        return datasets.Features({data.image: datasets.Image(), data.label: kind}), {
            data.image: pictures,
            data.label: labels,
        }
    texts = _fields(data.prompt) or ([data.text] if isinstance(data.text, str) else list(data.text))
    made: dict[str, list[Any]] = {name: [_sentence(random) for _ in range(rows)] for name in texts}
    features: dict[str, Any] = dict.fromkeys(texts, named)
    if data.answers is not None:
        features[data.label] = datasets.ClassLabel(names=[f"class {number}" for number in range(len(data.answers))])
        made[data.label] = random.integers(0, len(data.answers), rows).tolist()
    else:
        for name in _fields(data.answer):
            if name not in made:
                features[name], made[name] = datasets.Value("float32"), random.uniform(0, 5, rows).tolist()
    features["idx"], made["idx"] = datasets.Value("int32"), list(range(rows))
    return datasets.Features(features), made


def _fields(template: str | None) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template or "") if name]


def _sentence(random: np.random.Generator) -> str:
    words = ["the", "yes", "no", "able", "cat", "sat", "on", "mat", "7", "tree"]
    return " ".join(random.choice(words, int(random.integers(3, 12))).tolist())


def _picture(random: np.random.Generator) -> Image.Image:
    """A picture in colour or in grey; both occur."""
    wide = (SIDE, SIDE + 8, 3) if random.random() < 0.7 else (SIDE, SIDE)
    return Image.fromarray(random.integers(0, 256, wide, dtype=np.uint8))


def _labels(pictures: list[Any], classes: int, random: np.random.Generator, answer: Answer | None) -> list[int]:
    """A class for each picture; three of four are the teacher's where there is one."""
    labels = random.integers(0, classes, len(pictures)).tolist()
    if answer is not None:
        labels = [label if row % 4 == 3 else told for row, (label, told) in enumerate(zip(labels, answer(pictures)))]
    return labels


def _write_archive(file: Path, task: Task, rows: int, random: np.random.Generator, answer: Answer | None) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = []
    for _ in range(rows):
        stored.append(io.BytesIO())
        _picture(random).convert("L").save(stored[-1], "jpeg")
    labels = _labels([Image.open(picture) for picture in stored], len(task.classes or []), random, answer)
    with tarfile.open(file, "w") as archive:
        for row, (picture, label) in enumerate(zip(stored, labels)):
            for ending, content in (("cls", str(label).encode()), ("jpg", picture.getvalue())):
                entry = tarfile.TarInfo(f"s{row:07d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
