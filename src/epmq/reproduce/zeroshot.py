"""Heads from CLIP's text tower: a class is what the tower makes of its name in a few templates.

Every template is filled in with the class's name, its projected text embedding is normalised, and the normalised mean
over the templates, times the logit scale, is the class's row (Radford et al., arXiv 2103.00020). The head projects
the vision tower's pooled output as the whole model does, so its scores are the whole model's.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from epmq.data.processors import load_processor, tokenizer_of
from epmq.errors import InputError, error_context
from epmq.files import hash_file
from epmq.models.checkpoint import Checkpoint
from epmq.models.heads import POOLER, Head, save_head

# What the name of a cached head stands for beside its inputs; another way of computing heads needs another number.
CACHE_VERSION = 1
# Texts that the tower takes at once.
BATCH_SIZE = 256


def check_template(template: str) -> str:
    """Return a template with one `{}` where the class's name goes.

    Raises:
        ValueError: it cannot be filled in with one name.
    """
    try:
        filled = template.format("name")
    except (IndexError, KeyError, ValueError) as error:
        raise InputError(f"template {template!r}: one {{}} is the place of the class's name") from error
    if filled == template:
        raise InputError(f"template {template!r}: has no {{}}, the place of the class's name")
    return template


@torch.no_grad()
def text_head(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Head:
    """The head of one task by a whole `CLIPModel`: its classes, in the order of the labels, in texts with a `{}`."""
    texts = [template.format(name) for name in classes for template in templates]
    embeddings = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer(texts[start : start + BATCH_SIZE], padding=True, truncation=True, return_tensors="pt")
        embeddings.append(model.text_projection(model.text_model(**batch).pooler_output))
    rows = normalize(torch.cat(embeddings).float(), dim=-1).reshape(len(classes), len(templates), -1)
    weight = normalize(rows.mean(1), dim=-1) * model.logit_scale.float().exp()
    projection = model.visual_projection.weight.detach().float().clone()
    return Head(weight, torch.zeros(len(classes)), POOLER, True, list(classes), projection)


def text_heads(
    base: str | Path, tasks: Mapping[str, tuple[Sequence[str], Sequence[str]]], cache: Path
) -> dict[str, Path]:
    """Head files of several tasks, made from the base's text tower where they are not in the cache yet.

    Args:
        base: a `CLIPModel` with its tokenizer, as `epmq.models.checkpoint.Checkpoint` takes it.
        tasks: task → class names and templates.
        cache: folder for the files. A file's name stands for the content of the base's files, names and templates.

    Raises:
        FileNotFoundError, ValueError: the base is no such model; its folder is named.
    """
    folder = Checkpoint(base).path
    read = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".safetensors", ".bin"))
    content = [(file.name, hash_file(file)) for file in read]
    files = {}
    for task, texts in tasks.items():
        inputs = json.dumps([CACHE_VERSION, content, *map(list, texts)], ensure_ascii=False)
        files[task] = cache / f"{task}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.safetensors"
    missing = [task for task, file in files.items() if not file.exists()]
    if not missing:
        return files
    import transformers

    with error_context(folder, "no CLIP model with a text tower and its tokenizer"):
        model: Any = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        tokenizer = tokenizer_of(load_processor(folder))
        if tokenizer is None:
            raise InputError("no tokenizer")
    cache.mkdir(parents=True, exist_ok=True)
    for task in missing:
        draft = files[task].with_suffix(".draft")
        save_head(text_head(model.eval(), tokenizer, *tasks[task]), draft)
        draft.replace(files[task])
    return files
