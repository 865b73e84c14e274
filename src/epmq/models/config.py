"""Configs as transformers understands them: their fields by name, what the model's code reads of them, and changes."""

import ast
import copy
import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from epmq.errors import InputError, error_context
from epmq.models.checkpoint import Checkpoint

# Modules of transformers that read configs for all models.
_SHARED_CODE = ("transformers.modeling_rope_utils", "transformers.masking_utils")
ROPE = "rope_parameters"
# Where rope's settings were before transformers 5.
_OLD_ROPE = ("rope_scaling", "rope_theta", "partial_rotary_factor")
# What says of what kind a model is; no field of it.
_KIND = ("model_type", "architectures", "auto_map", "quantization_config")


@dataclass(frozen=True)
class ConfigField:
    """One value in a config: the (sub-)config that holds it, as which attribute, and the value.

    Where the attribute is a dict, such as `rope_parameters`, each of its entries is a field.
    """

    owner: Any
    name: str
    value: Any


def transformers_config(checkpoint: Checkpoint) -> Any:
    """What transformers makes of a checkpoint's config: old names replaced, defaults filled in, values checked.

    A ValueError says that transformers does not know the model type, or refuses a value.
    """
    import transformers

    # Of what the checkpoint holds, not of its file: a recipe may have changed it.
    config_class = type(transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False))
    return read_as(config_class, checkpoint.config)


def read_as(config_class: Any, content: dict[str, Any]) -> Any:
    """The same of the content of a `config.json`, which stays as it is, and of a known class."""
    return config_class.from_dict(_numbers(content))


def _numbers(value: Any) -> Any:
    """A copy of a JSON value with the numbers that JSON does not have, as transformers writes them into files."""
    if isinstance(value, dict):
        special = value.get("__float__")
        return float(special) if isinstance(special, str) else {name: _numbers(part) for name, part in value.items()}
    return [_numbers(part) for part in value] if isinstance(value, list) else value


def config_fields(config: Any, prefix: str = "") -> dict[str, ConfigField]:
    """All fields of a config by name; those of sub-configs and of dicts have dotted names."""
    fields = dict[str, ConfigField]()
    for name, value in vars(config).items():
        if name.startswith("_") or name in _KIND:
            continue
        if is_config(value):
            fields[f"{prefix}{name}.model_type"] = ConfigField(config, name, value.model_type)
            fields |= config_fields(value, f"{prefix}{name}.")
        else:
            entries = _entries(value, f"{prefix}{name}")
            fields |= {dotted: ConfigField(config, name, entry) for dotted, entry in entries}
    return fields


def is_config(value: Any) -> bool:
    """Whether a value in a config is a config itself."""
    return hasattr(value, "attribute_map") and hasattr(value, "model_type")


def _entries(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            yield from _entries(entry, f"{name}.{key}")
    else:
        yield name, list(value) if isinstance(value, tuple) else value


# --- what the code reads ------------------------------------------------------------------------------------------


class ConfigReads:
    """Which fields of its config the code of a model reads, as far as it takes part in that model.

    The source is asked, so that no list of fields an architecture is needed: names of attributes, and strings, as in
    `getattr(config, "position_buckets", -1)`. Where there is no source, all fields count as read.
    """

    def __init__(self, model: nn.Module) -> None:
        classes = {one for module in model.modules() for one in type(module).__mro__}
        modules = {one.__module__ for one in classes if one.__module__.startswith("transformers.models.")}
        modules = {name for name in modules if ".generation_" not in name}
        self._visitors = [_Reads(sys.modules[name], classes) for name in [*sorted(modules), *_SHARED_CODE]]

    def reads(self, field: ConfigField) -> bool:
        """Whether a field is read: by one of its names, or by a property of the config that is made of it."""
        aliases = {alias for alias, name in field.owner.attribute_map.items() if name == field.name}
        return self._reads(aliases | {field.name} | _properties_of(field.owner.__class__, field.name))

    def _reads(self, names: Iterable[str]) -> bool:
        return any(visitor.everything or visitor.names & set(names) for visitor in self._visitors)

    @property
    def padding_counts_positions(self) -> bool:
        """Whether positions begin after the padding token's number, as in RoBERTa."""
        return any(visitor.everything or visitor.positions_by_padding for visitor in self._visitors)


class _Reads(ast.NodeVisitor):
    """Names that a module of code reads, leaving out classes that take no part, and how weights are initialized."""

    def __init__(self, module: Any, classes: set[type]) -> None:
        self._module, self._classes = module, classes
        self.names, self.positions_by_padding, self.everything = set[str](), False, False
        try:
            self.visit(ast.parse(inspect.getsource(module)))
        except OSError:
            self.everything = True

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        named = getattr(self._module, node.name, None)
        if not (isinstance(named, type) and issubclass(named, nn.Module) and named not in self._classes):
            self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "_init_weights":
            self._enter(node)

    def _enter(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        if "position" in node.name.lower():
            words = {getattr(one, field, None) for one in ast.walk(node) for field in ("attr", "arg", "id")}
            self.positions_by_padding |= "padding_idx" in words
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.names.add(node.arg)  # some arguments take the config's value where they are not given

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.names.add(node.value)


@cache
def _properties_of(config_class: Any, field: str) -> set[str]:
    """Properties of a config class of its own that are made of a field."""
    from transformers import PreTrainedConfig

    own = [one for one in config_class.__mro__ if issubclass(one, PreTrainedConfig) and one is not PreTrainedConfig]
    properties = {name: value for one in own for name, value in vars(one).items() if isinstance(value, property)}
    codes = {name: getattr(value.fget, "__code__", None) for name, value in properties.items()}
    return {name for name, code in codes.items() if code is not None and field in code.co_names}


# --- changes ------------------------------------------------------------------------------------------------------


def changed(content: dict[str, Any], config_class: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` with other values in some fields; `changes` go by the names of `config_fields`.

    Raises:
        InputError: there is no such field, or it does not take the value.
    """
    changes = _flat(changes)
    if not changes:
        return content
    config, content = read_as(config_class, content), copy.deepcopy(content)
    fields, names = config_fields(config), {name: _find(config, name) for name in changes}
    values = {name: _like(fields.get(names[name]), value) for name, value in changes.items()}
    for name, value in values.items():
        _put(content, config, names[name].split("."), value)
    with error_context(f"config.{', config.'.join(changes)}", f"{config_class.__name__} does not take it"):
        found = config_fields(read_as(config_class, content))
    for name, value in values.items():
        taken = found.get(names[name])
        if taken is None or taken.value != value:
            raise InputError(
                f"config.{name}: {config_class.__name__} makes {taken and taken.value!r:.60} of {value!r:.60}"
            )
    return content


def _flat(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested and dotted names alike → dotted names."""
    result = dict[str, Any]()
    for name, value in changes.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _find(config: Any, name: str) -> str:
    """The name that a field has today, or an InputError where it has none."""
    from transformers.modeling_rope_utils import RopeParameters

    *path, leaf = name.split(".")
    owner = config
    for part in path:
        owner = owner.get(part) if isinstance(owner, dict) else getattr(owner, part, None)
    leaf = getattr(owner, "attribute_map", {}).get(leaf, leaf)
    known = vars(owner) if is_config(owner) else owner if isinstance(owner, dict) else {}
    in_rope = ROPE in path and isinstance(owner, dict) and leaf in RopeParameters.__annotations__
    if in_rope or (leaf in known and not leaf.startswith("_") and leaf not in _KIND):
        return ".".join([*path, leaf])
    if leaf in _OLD_ROPE and leaf in (known.get(ROPE) or {}):
        return ".".join([*path, ROPE, leaf])
    names = list(config_fields(config))
    near = difflib.get_close_matches(name, names, 1, 0.4) or [one for one in names if one.endswith(f".{leaf}")][:1]
    hint = f"; meant is {near[0]}?" if near else ""
    raise InputError(f"config.{name}: {type(config).__name__} has no such field{hint}")


def _like(field: ConfigField | None, value: Any) -> Any:
    """A number that YAML takes for a text (1e-5), as a number where the field is one."""
    if isinstance(value, str) and field and isinstance(field.value, int | float) and not isinstance(field.value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(content: dict[str, Any], config: Any, path: list[str], value: Any) -> None:
    """Set a field in the content of a `config.json`, of which transformers made `config`."""
    name, *rest = path
    current = getattr(config, name)
    if rest and not isinstance(current, dict):
        if not isinstance(content.get(name), dict):
            content[name] = current.to_dict()  # old files have these fields elsewhere, or none at all
        _put(content[name], current, rest, value)
        return
    if rest:
        entry = whole = copy.deepcopy(current)
        for part in rest[:-1]:
            entry = entry[part]
        entry[rest[-1]], value = value, whole
        current[rest[0]] = whole[rest[0]]  # for the next change of the same dict
    for other in {*(alias for alias, own in config.attribute_map.items() if own == name)}:
        content.pop(other, None)
    for other in _OLD_ROPE if name == ROPE else ():  # they would come first
        content.pop(other, None)
    content[name] = value
