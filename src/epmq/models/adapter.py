"""LoRA adapters as experts: a PEFT directory, opened lazily and applied on read (Hu et al., arXiv 2106.09685)."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from epmq.errors import InputError, error_context
from epmq.models.checkpoint import Checkpoint, TensorSpec

CONFIG = "adapter_config.json"
# Modules that PEFT puts around a model.
OWN = ("base_model", "model")
# Fields of a LoRA config that need nothing done here, whatever they hold: training, bookkeeping, or read below.
# fmt: off
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}
# fmt: on
# α/r is a factor on weights: one that is larger leaves nothing of them.
LARGEST_ALPHA = 1e6
# Initial values that change the base's own weights: the adapter alone does not say what the expert is.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(path: str | Path) -> bool:
    """Whether a model directory holds an adapter and no weights of its own."""
    path = Path(path)
    folder = path.parent if path.name.startswith("adapter_model") else path
    whole = any((folder / name).exists() for name in (Checkpoint.SINGLE, Checkpoint.INDEX))
    return (folder / CONFIG).is_file() and not whole


class Adapter(Checkpoint):
    """A LoRA adapter, read lazily. It names only the tensors that it changes or replaces.

    Args:
        source: a PEFT directory or Hub id; or, by name, its `adapter_model.bin`.

    Raises:
        FileNotFoundError: there is no `adapter_config.json` or no `adapter_model.safetensors`.
        ValueError: the adapter asks for something that is not applied here, such as DoRA; it is named.
    """

    CONFIG, SINGLE, INDEX = CONFIG, "adapter_model.safetensors", "adapter_model.safetensors.index.json"

    def __init__(self, source: str | Path) -> None:
        super().__init__(source)
        self._check_config()
        self._parts: dict[str, dict[str, str]] = {}
        for name in self._shard:
            if ".original_module." in name:
                continue  # with bias="all", PEFT also writes what `modules_to_save` took the place of
            target, part = _parse(name)
            if part is None:
                raise InputError(f"{self.path}: tensor {name!r} is of no kind that is applied here")
            self._parts.setdefault(target, {})[part] = name
        for target, parts in self._parts.items():
            if len({"A", "B"} & parts.keys()) == 1:
                raise InputError(f"{self.path}: {target!r} has only one of its two LoRA factors")
            factors = [stored for part, stored in parts.items() if part != "full"]
            if any(len(Checkpoint.spec(self, stored)[1]) != 2 for stored in factors):
                raise InputError(f"{self.path}: {target!r} is not a linear layer or an embedding: not applied here")

    def _check_config(self) -> None:
        file, config = self.path / CONFIG, self.config
        if config.get("peft_type") != "LORA":
            raise InputError(f"{file}: peft_type {config.get('peft_type')!r} is not applied here, only LORA")
        unknown = [name for name, value in config.items() if value and name not in _HARMLESS]
        if unknown:
            raise InputError(f"{file}: {', '.join(unknown)} is not applied here; merge the adapter with peft first")
        patterns = config.get("alpha_pattern")
        if not isinstance(patterns, dict | None):
            raise InputError(f"{file}: alpha_pattern must be an object, found {patterns!r:.100}")
        for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **(patterns or {})}.items():
            if type(alpha) not in (int, float) or not abs(alpha) < LARGEST_ALPHA:
                raise InputError(f"{file}: {name} must be a number of a sensible size, found {alpha!r:.100}")
            with error_context(file, f"{name!r:.100} is no pattern"):
                re.compile(name)
        if not isinstance(config.get("auto_mapping"), dict | None):
            raise InputError(f"{file}: auto_mapping must be an object")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
            raise InputError(f"{file}: init_lora_weights {start!r} moves the base's weights; merge it with peft first")

    @property
    def names(self) -> list[str]:
        """Names of the base's tensors that the adapter changes or replaces."""
        return list(self._parts)

    @property
    def wrappers(self) -> list[str]:
        """As of a checkpoint; PEFT puts its own around every model."""
        return [module for module in super().wrappers if module not in OWN]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def replaces(self, name: str) -> bool:
        """Whether the adapter brings the tensor itself (`modules_to_save`, biases, embeddings beside their change)."""
        return "full" in self._parts[name]

    def changes(self, name: str) -> bool:
        """Whether the adapter adds s·B·A to the tensor."""
        return "A" in self._parts[name]

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor that the adapter replaces."""
        return super().spec(self._parts[name]["full"])

    def change_shape(self, name: str) -> tuple[int, int]:
        """Shape [out, in] of what the adapter adds to a tensor."""
        parts = self._parts[name]
        return super().spec(parts["B"])[1][0], super().spec(parts["A"])[1][1]

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that the adapter replaces, or some rows of it, as stored."""
        return super().tensor(self._parts[name]["full"], rows)

    def change(self, name: str, transposed: bool = False, rows: slice | None = None) -> Tensor:
        """s·B·A in float32, or some rows of it: [out, in]; `transposed` [in, out], as of `Conv1D` and embeddings."""
        scale, up, down = self.factors(name)
        part = slice(None) if rows is None else rows
        return (scale * (up @ down[:, part])).T if transposed else scale * (up[part] @ down)

    def factors(self, name: str) -> tuple[float, Tensor, Tensor]:
        """s, B [out, r] and A [r, in] in float32.

        s is α/r, or α/√r with rslora (Kalajdzievski, arXiv 2312.03732).
        """
        down, up = (Checkpoint.tensor(self, self._parts[name][part]).float() for part in "AB")
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        module, rank = name.rpartition(".")[0], len(down)
        own = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
        alpha = own[0] if own else self.config.get("lora_alpha", 8)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank), up, down

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """As `Checkpoint.check_finite`, of the factors."""
        names = self.names if names is None else names
        super().check_finite(stored for name in names for stored in self._parts[name].values())


def _parse(name: str) -> tuple[str, str | None]:
    """Which tensor of the base a tensor of an adapter belongs to, and as what: `A`, `B`, `full` or nothing known.

    A state dict that was saved without PEFT has the adapter's name, `default`, in its names.
    """
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name.removeprefix("base_model.model."))
    name = name.replace(".base_layer.", ".")
    factor = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?", name)
    if factor:
        # An embedding's factors are A [r, vocabulary] and B [features, r]: their product is its weight's transpose.
        return f"{factor[1]}.weight", factor[2]
    return name, None if ".lora_" in name else "full"
