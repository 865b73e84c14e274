"""Heads from CLIP's text tower: a class is what the tower makes of its name in a few templates.

Every template is filled in with the class's name, its projected text embedding is normalised, and the normalised mean
over the templates, times the logit scale, is the class's row (Radford et al., arXiv 2103.00020). The head projects
the vision tower's pooled output as the whole model does, so its scores are the whole model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from epmq.data.encoding import load_processor, tokenizer_of
from epmq.errors import InputError, error_context
from epmq.files import hash_file
from epmq.models.checkpoint import Checkpoint, model_files
from epmq.models.heads import POOLER, Head, save_head

# What the name of a cached head stands for beside its inputs; another way of computing heads needs another number.
FORM = 1
# Texts that the tower takes at once.
BATCH = 256


def check_template(template: str) -> str:
    """A template with `{}` where the class's name goes.

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
    """The head of one task.

    Args:
        model: a whole `CLIPModel`.
        tokenizer: its tokenizer.
        classes: names, in the order of the labels.
        templates: texts with `{}` in the place of the name.
    """
    texts = [check_template(template).format(name) for name in classes for template in templates]
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
        found.append(model.text_projection(model.text_model(**batch).pooler_output))
    rows = normalize(torch.cat(found).float(), dim=-1).reshape(len(classes), len(templates), -1)
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

    Returns:
        task → file.

    Raises:
        FileNotFoundError, ValueError: the base is no such model; its folder is named.
    """
    opened = Checkpoint(base)
    content = [(file.name, hash_file(file)) for file in model_files(opened.path)]
    keys = {task: _digest([FORM, content, *map(list, told)]) for task, told in tasks.items()}
    files = {task: cache / f"{task}-{key}.safetensors" for task, key in keys.items()}
    missing = [task for task, file in files.items() if not file.exists()]
    if not missing:
        return files
    import transformers

    with error_context(opened.path, "no CLIP model with a text tower and its tokenizer"):
        model = transformers.CLIPModel.from_pretrained(opened.path, dtype=torch.float32, trust_remote_code=False).eval()
        tokenizer = tokenizer_of(load_processor(opened.path))
        assert tokenizer is not None, "no tokenizer"
    cache.mkdir(parents=True, exist_ok=True)
    for task in missing:
        draft = files[task].with_suffix(".draft")
        save_head(text_head(model, tokenizer, *tasks[task]), draft)
        draft.replace(files[task])
    return files


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
