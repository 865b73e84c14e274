"""The commented recipe of `epmq init`, made from the fields of the recipe's models: names, defaults, descriptions."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from epmq.recipe import Data, Expert, Recipe

TITLE = "# A recipe of epmq. Only base, experts and output are needed; every other line shows its default."
# What has no default.
EXAMPLE: dict[str, Any] = {
    "base": "path/or/hub-id",
    "experts": [
        {
            "name": task,
            "model": "path/or/hub-id",
            "calibration": {"path": f"data/{task}/train.jsonl"},
            "evaluation": {"path": f"data/{task}/test.jsonl"},
        }
        for task in ("sentiment", "topic")
    ],
    "output": "merged-4bit",
}
COMMENT_COLUMN = 32
WIDTH = 120


def recipe_template() -> str:
    """A recipe in YAML with every field: what is needed filled in, the rest with its default and what it means."""
    lines = [TITLE, *_line(f"base: {_flow(EXAMPLE['base'])}", _comment(Recipe, "base")), "experts:"]
    for number, expert in enumerate(EXAMPLE["experts"]):
        for name, value in expert.items():
            text = f"  {'-' if name == 'name' else ' '} {name}: {_flow(value)}"
            lines += _line(text, "" if number else _comment(Expert, name))
    lines += [*_line(f"output: {_flow(EXAMPLE['output'])}", _comment(Recipe, "output")), ""]
    default = Recipe.model_validate(EXAMPLE)
    lines += (line for name in Recipe.model_fields if name not in EXAMPLE for line in _field(default, name))
    lines += ["", "# What calibration and evaluation take:", *_commented_out(Data, indent="")]
    return "\n".join(lines) + "\n"


def _field(settings: BaseModel, name: str, indent: str = "") -> Iterator[str]:
    """A field with its value and what it means; one without a value is commented out."""
    value = getattr(settings, name)
    if not isinstance(value, BaseModel):
        text = f"{name}: {_flow(value)}" if value is not None else f"# {name}:"
        yield from _line(indent + text, _comment(type(settings), name))
        return
    yield f"{indent}{name}:"
    models = list(_models(type(settings).model_fields[name].annotation))
    methods = [model.model_fields["method"].default for model in models if len(models) > 1]
    for part in type(value).model_fields:
        if part == "method" and methods:
            yield from _line(f"{indent}  method: {value.method}", _either(methods))  # type: ignore[attr-defined]
        else:
            yield from _field(value, part, indent + "  ")
    for model in models:
        if type(value) is not model:
            about = (model.__doc__ or "").strip().splitlines()
            yield from _line(f"{indent}  # method: {model.model_fields['method'].default}", about[0] if about else "")
            yield from _commented_out(model, indent + "  ", type(value).model_fields)


def _commented_out(model: type[BaseModel], indent: str, known: Mapping[str, FieldInfo] | None = None) -> Iterator[str]:
    """The fields of a model as comments, with their defaults; without the method and what is just so in `known`."""
    for name, field in model.model_fields.items():
        twin = (known or {}).get(name)
        if name != "method" and (twin is None or _signature(twin) != _signature(field)):
            default = "" if field.is_required() or field.default is None else f" {_flow(field.default)}"
            yield from _line(f"{indent}# {name}:{default}", _comment(model, name))


def _signature(field: FieldInfo) -> tuple[Any, ...]:
    return field.annotation, field.default, field.description


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's type: one, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _comment(model: type[BaseModel], name: str) -> str:
    """What a field means, and its choices where the description does not name them."""
    field = model.model_fields[name]
    about, choices = field.description or "", []
    if get_origin(field.annotation) is Literal:
        choices = [str(choice) for choice in get_args(field.annotation)]
    if not choices or all(choice in about for choice in choices):
        return about
    return "; ".join(filter(None, (_either(choices), about)))


def _either(choices: list[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return str(yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=WIDTH)).strip()[1:-1]


def _line(text: str, comment: str) -> Iterator[str]:
    """A line with its comment at the right; what does not fit goes on below."""
    if not comment:
        yield text
        return
    column = max(COMMENT_COLUMN, len(text) + 1)
    first, *more = textwrap.wrap(comment, WIDTH - column - 2) if column < WIDTH - 30 else [comment]
    yield f"{text:{column}}# {first}"
    for part in more:
        yield f"{'':{column}}# {part}"
