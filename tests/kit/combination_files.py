"""The files of a combination: tiny checkpoints, adapters, heads, tokenizers and data, and a recipe over them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from tests.kit.architecture_kinds import Architecture
from tests.kit.architectures import ARCHITECTURES
from tests.kit.comparison import fine_tuned
from tests.kit.quantized import PLAIN_OUTSIDE

if TYPE_CHECKING:
    from tests.kit.combinations import Combination

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "big", "small"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
# Tokens after the words, up to those that stand for pictures in the models that read them among their tokens.
FILLERS = tuple(f"<{index}>" for index in range(20, 28))
MARKS = {"video_token": "<video>", "eoi_token": "<eoi>", "boi_token": "<boi>", "image_token": "<image>"}
# Head → transformers' table of its classes, and settings of its config.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence": ("SEQUENCE_CLASSIFICATION", {"num_labels": 3}),
    "regression": ("SEQUENCE_CLASSIFICATION", {"num_labels": 1, "problem_type": "regression"}),
    "multi_label": ("SEQUENCE_CLASSIFICATION", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "token": ("TOKEN_CLASSIFICATION", {"num_labels": 5}),
    "question": ("QUESTION_ANSWERING", {}),
    "choice": ("MULTIPLE_CHOICE", {}),
    "masked": ("MASKED_LM", {}),
    "image": ("IMAGE_CLASSIFICATION", {"num_labels": 3}),
    "ctc": ("CTC", {}),
    "audio": ("AUDIO_CLASSIFICATION", {"num_labels": 3}),
}
# Which heads an adapter may have, by PEFT's name of the task.
ADAPTED = {
    "none": None,
    "sequence": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
}
# Kind of architecture → heads (`file` is a head.safetensors), and data.
HEADS = {
    "encoder": ("file", "sequence", "regression", "multi_label", "token", "question", "choice", "masked"),
    "decoder": ("file", "sequence", "regression", "token", "question"),
    "seq2seq": ("sequence", "question"),
    "image": ("file", "image"),
    "audio": ("ctc", "audio"),
}
DATA = {
    "encoder": ("texts", "texts", "pairs", "odd_labels", "long", "batches", "empty", "questions", "words"),
    "decoder": ("documents", "documents", "unpacked", "chats", "long", "odd_labels", "batches", "empty"),
    "seq2seq": ("targets", "targets", "long", "batches", "empty"),
    "image": ("images", "images", "odd_images", "batches"),
    "audio": ("batches", "batches", "texts"),
    "speech": ("batches", "batches", "targets"),
    "dual": ("image_texts", "image_texts", "batches", "texts", "images"),
    "vision_language": ("batches", "batches", "documents", "image_texts", "chats"),
}
# Head, or kind of architecture where there is none → data that such an expert is scored on.
SCORED = {
    **dict.fromkeys(("sequence", "regression", "file"), ("texts", "texts", "pairs")),
    **{"multi_label": ("texts",), "token": ("words",), "question": ("questions",), "image": ("images",)},
    **{"decoder": ("documents", "unpacked", "chats"), "seq2seq": ("targets",)},
}
ODD = (0.5, "good", None, True, [0, 1], "missing")


@dataclass
class Files:
    """What was written, and how to run it.

    Attributes:
        models: expert → the model that its files were written from.
        probes: expert → ready batches for its class.
        calibration: expert → ready batches, in the place of data in the recipe.
    """

    combination: Combination
    folder: Path
    architecture: Architecture
    recipe: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    calibration: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.models)

    def head(self, name: str) -> str:
        return self.combination.heads[self.names.index(name)]

    def is_adapter(self, name: str) -> bool:
        return self.combination.adapters[self.names.index(name)]


def head_class(architecture: Architecture, head: str) -> Any:
    """The class of transformers with that head; None if there is none."""
    table: Any = getattr(transformers, f"MODEL_FOR_{CLASSES[head][0]}_MAPPING", {})
    config = type(architecture.make_config())
    return table.get(config, None)


def heads_of(architecture: Architecture) -> list[str]:
    """The heads that an architecture may have."""
    heads = HEADS.get(architecture.kind, ())
    return ["none", *(head for head in heads if head == "file" or head_class(architecture, head) is not None)]


def model_class(files: Files, head: str) -> Any:
    """The class in which an expert is trained."""
    own = getattr(transformers, files.architecture.model)
    return own if head in ("none", "file") else head_class(files.architecture, head)


def write_files(combination: Combination, folder: Path) -> Files:
    """Write everything that a combination names."""
    files = Files(combination, folder, ARCHITECTURES[combination.architecture])
    torch.manual_seed(combination.number)
    _write_base(files)
    for number, head in enumerate(combination.heads):
        _write_expert(files, f"e{number}", head, number)
    write_processor(files, folder / "base")
    data = {name: _write_data(files, name) for name in files.names}
    experts = [{"name": name, "model": str(folder / name), **data[name]} for name in files.names]
    files.recipe = {
        "base": str(folder / "base"),
        "experts": experts,
        "merge": {"method": "task_arithmetic", "scaling": combination.scaling},
        "quantize": (PLAIN_OUTSIDE if combination.quantize["method"] != "none" else {}) | combination.quantize,
        "format": combination.form,
        "output": str(folder / "out"),
        **{"samples": 8, "batch_size": 4},
    }
    if combination.data in ("documents", "chats", "targets", "unpacked"):
        files.recipe["max_length"] = 16
    return files


def _shards(combination: Combination) -> dict[str, Any]:
    return {"max_shard_size": "40KB"} if combination.sharded else {}


def _write_base(files: Files) -> None:
    combination, architecture = files.combination, files.architecture
    masked = head_class(architecture, "masked").__name__ if combination.masked_base else None
    model = architecture.build(combination.number, tied=combination.tied[0], model=masked)
    model.save_pretrained(files.folder / "base", **_shards(combination))


def _write_expert(files: Files, name: str, head: str, number: int) -> None:
    """Fine-tune the base a little in its own class, tied or not, and write it or its adapter."""
    combination, folder = files.combination, files.folder / name
    settings: dict[str, Any] = dict(CLASSES[head][1]) if head in CLASSES else {}
    tied = combination.tied[number + 1]
    if tied is not None and not combination.adapters[number]:
        settings["tie_word_embeddings"] = tied
    model = model_class(files, head).from_pretrained(files.folder / "base", **settings)
    output, words = model.get_output_embeddings(), None
    if tied is False and combination.tied[0] and output is not None and not combination.adapters[number]:
        words = model.get_input_embeddings().weight.detach().clone()
        if output.weight.shape == words.shape:
            output.weight = torch.nn.Parameter(words)
    seed = 10 * combination.number + number + 1
    if combination.adapters[number]:
        model = _adapted(model, ADAPTED[head], seed)
    else:
        fine_tuned(model, model, seed)
    model.eval().save_pretrained(folder, **({} if combination.adapters[number] else _shards(combination)))
    files.models[name] = model
    files.probes[name] = ready_batches(files.architecture, head)
    if head == "file":
        _write_head(files, name)


def _adapted(model: Any, task: str | None, seed: int) -> Any:
    """The model with a LoRA adapter on its linear layers, moved off its start."""
    output = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    ends = {
        module_name.rpartition(".")[2]
        for module_name, module in model.named_modules()
        if isinstance(module, kinds) and module is not output and any(part.isdigit() for part in module_name.split("."))
    }
    turned = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in model.modules())
    config = peft.LoraConfig(r=4, target_modules=sorted(ends), task_type=task, fan_in_fan_out=turned)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def _write_head(files: Files, name: str) -> None:
    """A linear head on the mean of the last hidden state."""
    config = files.architecture.make_config()
    sizes = [getattr(config, key, None) for key in ("hidden_size", "d_model", "dim", "n_embd")]
    width = next(size for size in [*sizes, (getattr(config, "hidden_sizes", None) or [0])[-1]] if size)
    generator = torch.Generator().manual_seed(files.combination.number)
    tensors = {"weight": torch.randn(3, width, generator=generator), "bias": torch.randn(3, generator=generator)}
    settings = {"pooling": "mean", "normalize": True, "labels": ["x", "y", "z"]}
    save_file(tensors, files.folder / name / "head.safetensors", metadata={"head": json.dumps(settings)})


def ready_batches(architecture: Architecture, head: str) -> list[dict[str, Any]]:
    """Ready batches for the class with that head."""
    batches = architecture.batches()
    if head == "choice":
        return [{key: torch.stack([value, value.flip(0)], 1) for key, value in batch.items()} for batch in batches]
    if architecture.kind == "seq2seq" and head != "none":
        for batch in batches:
            batch.pop("decoder_input_ids")
            batch["input_ids"][:, -1] = getattr(architecture.make_config(), "eos_token_id", None) or 1
    return batches


def write_tokenizer(folder: Path, extra: tuple[str, ...] = (), **settings: Any) -> None:
    """A tokenizer of whole words, which writes an end token, with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS]
    if "<image>" in extra:
        words += extra
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    pair = "$A </s> $B </s>"
    core.post_processor = TemplateProcessing(single="$A </s>", pair=pair, special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    if "<image>" in extra:
        settings = {**settings, "extra_special_tokens": MARKS}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{**names, **settings})
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.save_pretrained(folder)


def write_processor(files: Files, folder: Path) -> None:
    """Tokenizer, image processor or feature extractor, whatever the architecture takes."""
    kind = files.architecture.kind
    if kind in ("encoder", "decoder", "seq2seq", "dual", "vision_language"):
        length = {"model_max_length": 64 if files.combination.number % 2 else 10**30}
        write_tokenizer(folder, FILLERS + tuple(MARKS.values()) if kind == "vision_language" else (), **length)
    if kind in ("image", "dual", "vision_language"):
        size = files.architecture.batches()[0]["pixel_values"].shape[-1]
        size = size if kind == "image" else 28
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
        processor.save_pretrained(folder)
    if kind == "audio":
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    if kind == "speech":
        transformers.WhisperFeatureExtractor(feature_size=8, n_fft=64, hop_length=16).save_pretrained(folder)


def _write_data(files: Files, name: str) -> dict[str, Any]:
    """Calibration and evaluation data of an expert, as fields of the recipe."""
    from tests.kit.combination_data import write_data

    combination, fields = files.combination, dict[str, Any]()
    if combination.calibrates and combination.data == "batches":
        files.calibration[name] = ready_batches(files.architecture, files.head(name))
    elif combination.calibrates:
        fields["calibration"] = write_data(combination.data, files, name, "calibration")
    kinds = SCORED.get(files.architecture.kind if files.head(name) == "none" else files.head(name), ())
    if files.architecture.kind == "image" and kinds:
        kinds = ("images",)
    if combination.evaluates and combination.data != "batches" and combination.number % 8 == 0:
        kinds = (combination.data,)  # whatever it is calibrated on
    if combination.evaluates and kinds:
        kind = kinds[combination.number % len(kinds)]
        fields["evaluation"] = write_data(kind, files, name, "evaluation")
    return fields
