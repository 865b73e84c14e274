"""The output's tokenizer and processor, the chat templates of its tasks, and where its texts end."""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epmq.data.processors import load_processor
from epmq.data.tokens import (
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    chat_templates,
    open_tokenizer,
    own_files,
    special_tokens,
)
from epmq.errors import error_context
from epmq.files import read_json, write_json
from epmq.merging.experts import ExpertSet

GENERATION = "generation_config.json"


@dataclass
class OutputProcessor:
    """What turns texts and images into the merged model's inputs.

    Attributes:
        processor: the base's, with the output's tokenizer; None where the base has none.
        templates: task → chat template of its conversations, where that is not the output's default.
        named: name → chat template of the output; empty where they are as the tokenizer's folder has them.
        generation: content of the output's `generation_config.json`; None where it is the base's.
    """

    processor: Any = None
    templates: dict[str, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] | None = None


def output_processor(experts: ExpertSet) -> OutputProcessor:
    """What the output will have; what comes from experts goes into their notes."""
    vocabulary, source = experts.vocabulary, _source(experts)
    processor = load_processor(experts.base.path)
    tokenizer = copy.deepcopy(vocabulary.tokenizer)  # encoding changes how it pads
    if tokenizer is None and source != experts.base.path:
        with error_context(source, "transformers cannot open the tokenizer"):
            tokenizer = open_tokenizer(source)
    if tokenizer is not None and hasattr(processor, "tokenizer"):
        processor.tokenizer = tokenizer
    elif tokenizer is not None:
        processor = tokenizer
    plan = OutputProcessor(processor, generation=_generation(experts))
    if processor is not None and hasattr(getattr(processor, "tokenizer", processor), "chat_template"):
        _set_templates(plan, experts)
    return plan


def _source(experts: ExpertSet) -> Path:
    return experts.vocabulary.source or experts.base.path


def _set_templates(plan: OutputProcessor, experts: ExpertSet) -> None:
    """Let every task have its expert's chat template; the default is the tokenizer's own, else the first expert's."""
    found = {task: _bound_template(experts, task) for task in sorted(experts.experts)}
    theirs = {task: template for task, template in found.items() if template is not None}
    ours = chat_templates(_source(experts))
    default = ours.get("default")
    others = {task: template for task, template in theirs.items() if template != default}
    if not others:
        return
    tasks = ", ".join(others)
    if default is None:
        plan.named = {**ours, "default": next(iter(others.values()))}
        experts.notes.append(f"the base has no chat template: the output has that of {tasks}")
    else:
        plan.named = {**ours}
        experts.notes.append(f"another chat template than the output's default: {tasks}; it is saved by that name")
    if default is not None or len(set(others.values())) > 1:
        plan.named |= {task: template for task, template in others.items() if task != "default"}
        plan.templates = others
    tokenizer = getattr(plan.processor, "tokenizer", plan.processor)
    tokenizer.chat_template = plan.named if len(plan.named) > 1 else plan.named["default"]


def _bound_template(experts: ExpertSet, task: str) -> str | None:
    """An expert's chat template; tokens that it calls by their roles, such as `eos_token`, are set to the expert's."""
    folder = experts.experts[task].path
    template = chat_templates(folder).get("default")
    if template is None:
        return None
    ours = special_tokens(_source(experts))
    if experts.vocabulary.tokenizer is not None:
        ours = experts.vocabulary.tokenizer.special_tokens_map
    roles = {role: token for role, token in special_tokens(folder).items() if role in template}
    sets = [f"{{%- set {role} = {token!r} %}}" for role, token in roles.items() if ours.get(role) != token]
    # A line break behind a statement is lost.
    return "".join(sets) + ("\n" if sets and template.startswith("\n") else "") + template


def _generation(experts: ExpertSet) -> dict[str, Any] | None:
    """The base's generation config with the ends of text of the experts, where they have others."""
    if not experts.model.can_generate():
        return None
    vocabulary, ends = experts.vocabulary, _ends(experts.base.path, experts.base.checkpoint.config)
    moved = vocabulary.merged_numbers("")
    ends, new = [moved.get(end, end) for end in ends], dict[int, str]()
    for task, expert in sorted(experts.experts.items()):
        numbers = vocabulary.merged_numbers(task)
        theirs = _ends(expert.path, {} if expert.adapter is not None else expert.checkpoint.config)
        found = [numbers.get(end) if task in vocabulary.theirs else end for end in theirs]
        last = special_tokens(expert.path).get("eos_token")
        if last != special_tokens(experts.base.path).get("eos_token"):  # adapters say it nowhere else
            found.append(vocabulary.numbers.get(last or ""))
        for number in found:
            if number is not None and number not in ends:
                new.setdefault(number, task)
    if not new:
        return None
    for number, task in new.items():
        experts.notes.append(f"generated texts end at token {number}, too, as those of expert {task} do")
    file = experts.base.path / GENERATION
    content = read_json(file) if file.exists() else _default_generation(experts.model.config)
    content.pop("_from_model_config", None)  # it no longer is
    return {**vocabulary.renumbered("", content), "eos_token_id": [*ends, *sorted(new)]}


def _default_generation(config: Any) -> dict[str, Any]:
    """What transformers would make of a model's config."""
    from transformers import GenerationConfig

    content: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
    return content


def _ends(folder: Path, config: dict[str, Any]) -> list[int]:
    """The numbers of the tokens at which a model ends a text."""
    file, field = folder / GENERATION, "eos_token_id"
    content = read_json(file) if file.exists() else {}
    text = config.get("text_config")
    ends = content.get(field, config.get(field, text.get(field) if isinstance(text, dict) else None))
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def write_processor(plan: OutputProcessor, experts: ExpertSet, folder: Path) -> None:
    """Put into a folder, where the base's processor lies already, what the output has of its own."""
    tokenizer, source = experts.vocabulary.tokenizer, _source(experts)
    if tokenizer is not None:
        _remove(own_files(tokenizer), folder)
        if plan.named:
            tokenizer.chat_template = plan.named if len(plan.named) > 1 else plan.named["default"]
        tokenizer.save_pretrained(folder)
    elif source != experts.base.path:
        files = own_files(getattr(plan.processor, "tokenizer", plan.processor))
        _remove(files, folder)
        for name in sorted(files):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if plan.named and tokenizer is None:
        _write_templates(plan.named, folder)
    if plan.generation is not None:
        write_json(folder / GENERATION, plan.generation)


def _remove(files: set[str], folder: Path) -> None:
    for name in files:
        (folder / name).unlink(missing_ok=True)


def _write_templates(named: dict[str, str], folder: Path) -> None:
    for name, template in named.items():
        file = folder / TEMPLATE_FILE if name == "default" else folder / TEMPLATE_FOLDER / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")
