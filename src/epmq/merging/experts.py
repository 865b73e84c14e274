"""The merged model and the experts as sources of tensors, read and merged one tensor at a time."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import InputError
from epmq.merging.methods import METHODS, magnitude_threshold
from epmq.models import adapter as adapters
from epmq.models.adapter import Adapter, is_adapter
from epmq.models.blocks import LINEAR, find_stacks, is_transposed
from epmq.models.checkpoint import Checkpoint, TensorSpec, architecture_of, is_finite, resolve
from epmq.models.meta import (
    build_meta_model,
    has_task_head,
    materialize,
    named_class,
    rename,
    set_tensor,
    shared_checkpoint,
    tie,
    tied_names,
)
from epmq.recipe import Recipe

# Entries of a tensor that are read at once when it is merged.
ROWS = 1 << 22

LOG = logging.getLogger("epmq")


class Sources:
    """Base and experts of a recipe, opened and checked.

    Attributes:
        base: the base checkpoint.
        config: content of the `config.json` of what base and experts share.
        model: the skeleton of that.
        experts: task name → the expert's checkpoint or adapter.
        names: tensors of the model that the base has, as `state_dict` calls them, without tied copies.
        tied: tensors that share another one's storage in the base: name → the name it follows.
        absent: tensors of the model outside its blocks that the base lacks, such as a pooler; they are zero.
        notes: fallbacks taken, in words; they go into the report.

    Raises:
        ValueError, FileNotFoundError: a checkpoint is missing, or does not fit the base; the tensor and both shapes
            are named.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.notes: list[str] = []
        self.base = Checkpoint(recipe.base)
        self.experts = {
            expert.name: Adapter(path) if is_adapter(path) else Checkpoint(path)
            for expert in recipe.experts
            for path in [resolve(expert.model)]
        }
        full = [expert for expert in self.experts.values() if not isinstance(expert, Adapter)]
        self._shared = shared_checkpoint(self.base, full)
        self.config = self._shared.config
        self.model = build_meta_model(self._shared)
        self.tied = tied_names(self.model)
        self._stored = self._rename(self.base)[0]
        self._untie()
        renamed = {task: self._rename(expert) for task, expert in self.experts.items()}
        self._expert_stored = {task: stored for task, (stored, _) in renamed.items()}
        self._expert_extra = {task: extra for task, (_, extra) in renamed.items()}
        self._thresholds: list[float] | None = None
        state = self.model.state_dict()
        wanted = [name for name in state if name not in self.tied]
        self.names = [name for name in wanted if name in self._stored]
        self.absent = [name for name in wanted if name not in self._stored]
        self._check_base(state)
        for task, expert in self.experts.items():
            if isinstance(expert, Adapter):
                self._check_adapter(task, expert)
            else:
                self._check_expert(task)
            self._check_tied(task)
        self._heads = {task: self._find_head(task) for task in self.experts}
        self._fill_absent(self.model)
        self._warn_of_pickles()

    def _warn_of_pickles(self) -> None:
        for checkpoint in (self.base, *self.experts.values()):
            for name in checkpoint.pickles:
                note = f"{checkpoint.path / name} is a pickle: only tensors were read from it; safetensors are safer"
                self.notes.append(note)
                LOG.warning(note)

    def _rename(self, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
        try:
            found, extra = rename(self.model, checkpoint.names)
        except ValueError as error:
            raise InputError(f"{checkpoint.path}: {error}") from None
        if not isinstance(checkpoint, Adapter):
            for name, leader in self.tied.items():
                if name in found:  # some files hold a shared tensor under another of its names
                    found.setdefault(leader, found[name])
        return found, extra

    def _untie(self) -> None:
        """Let go of what the config ties but the base holds with different values, as `from_pretrained` does.

        FLAN-T5 is such a model: transformers 5 ties every T5, whatever its config says.
        """
        for name, leader in list(self.tied.items()):
            pair = {self._stored[key] for key in (name, leader) if key in self._stored}
            if len(pair) == 2 and not torch.equal(*(self.base.tensor(stored) for stored in pair)):
                del self.tied[name]

    def _check_base(self, state: dict[str, Tensor]) -> None:
        for name in self.names:
            found, wanted = list(self.base.shape(self._stored[name])), list(state[name].shape)
            if found != wanted:
                raise InputError(f"{self.base.path}: tensor {name!r} is {found}, but {wanted} by config.json")
            if torch.is_floating_point(state[name]) and self.base.dtype(self._stored[name]) is None:
                kind = self.base.dtype_name(self._stored[name])
                raise InputError(f"{self.base.path}: tensor {name!r} is {kind}, not float64, 32, 16 or bfloat16")
        try:
            inside = tuple(stack.name + "." for stack in find_stacks(self.model))
        except ValueError as error:
            raise InputError(f"{self.base.path}: {error}") from None
        for name in self.absent:
            if name.startswith(inside) or name.endswith(("embeddings.weight", "embed_tokens.weight")):
                raise InputError(f"{self.base.path}: no tensor for {name!r} of {type(self.model).__name__}")
        if self.absent:
            self.notes.append(f"not in the base, left out: {', '.join(self.absent)}")

    def _check_expert(self, task: str) -> None:
        expert, stored = self.experts[task], self._expert_stored[task]
        ours, theirs = self.config.get("model_type"), expert.config.get("model_type")
        if ours != theirs:
            raise InputError(f"expert {task}: model type {theirs!r}, but the base is {ours!r} ({expert.path})")
        if expert.config.get("quantization_config"):
            raise InputError(f"expert {task}: quantized already; give the model it was quantized from ({expert.path})")
        if not stored:
            raise InputError(f"expert {task}: shares no tensor with the base ({expert.path})")
        for name in self.names:
            if name not in stored:
                if any(part.isdigit() for part in name.split(".")):
                    raise InputError(f"expert {task}: tensor {name!r} is missing in {expert.path}")
                self.notes.append(f"expert {task} has no tensor {name}: the base's takes its place")
                continue
            self._check_shape(task, name, expert.shape(stored[name]))
            if self.base.dtype(self._stored[name]) is not None and expert.dtype(stored[name]) is None:
                kind = expert.dtype_name(stored[name])
                raise InputError(f"expert {task}: tensor {name!r} is {kind}, not a float ({expert.path})")

        for stack in find_stacks(self.model):
            block = re.compile(rf"(?:^|\.){re.escape(stack.name)}\.(\d+)\.")
            for name in self._expert_extra[task]:
                index = block.search(name)
                if index and int(index[1]) >= len(stack.blocks) and name not in self.base:
                    raise InputError(f"expert {task}: tensor {name!r} has no counterpart in the base ({expert.path})")

    def _check_adapter(self, task: str, adapter: Adapter) -> None:
        if not self._expert_stored[task]:
            raise InputError(f"expert {task}: the adapter changes no tensor of the base ({adapter.path})")
        stored = self._expert_stored[task]
        for name in [*self._expert_extra[task], *(stored[name] for name in self.absent if name in stored)]:
            if adapter.changes(name):
                raise InputError(f"expert {task}: the adapter changes {name!r}, which the base lacks ({adapter.path})")
        for name in self.names:
            if name in stored and adapter.replaces(stored[name]):
                self._check_shape(task, name, adapter.shape(stored[name]))
            if name in stored and adapter.changes(stored[name]):
                rows, columns = adapter.change_shape(stored[name])
                self._check_shape(task, name, (columns, rows) if self._transposed(name) else (rows, columns))

    def _check_tied(self, task: str) -> None:
        """What is one tensor in the base must be one in the expert."""
        adapter = self.experts[task] if isinstance(self.experts[task], Adapter) else None
        for name, leader in self.tied.items():
            if name in self._expert_stored[task]:
                ours, theirs = self.expert_tensor(task, name), self.expert_tensor(task, leader)
                same = ours.shape == theirs.shape and (
                    torch.equal(ours, theirs) or torch.allclose(ours.float(), theirs.float(), atol=1e-6)
                )
                if not same:
                    place = self.experts[task].path
                    raise InputError(
                        f"expert {task}: {name!r} differs from {leader!r}, its equal in the base ({place})"
                    )
            elif adapter is not None and leader in self._expert_stored[task]:
                self.notes.append(f"expert {task} was trained on {leader} alone; {name}, its equal, follows it")

    def _check_shape(self, task: str, name: str, found: tuple[int, ...]) -> None:
        wanted = self.base.shape(self._stored[name])
        if found != wanted:
            place = self.experts[task].path
            raise InputError(
                f"expert {task}: tensor {name!r} is {list(found)}, but {list(wanted)} in the base ({place})"
            )

    def _transposed(self, name: str) -> bool:
        module = self.model.get_submodule(name.rpartition(".")[0])
        return is_transposed(module) if isinstance(module, LINEAR) else isinstance(module, nn.Embedding)

    def _fill_absent(self, model: nn.Module) -> None:
        state = model.state_dict()
        for name in self.absent:
            set_tensor(model, name, torch.zeros(state[name].shape))

    def skeleton(self) -> Any:
        """Another copy of the model without its weights."""
        model = build_meta_model(self._shared)
        self._fill_absent(model)
        return model

    def whole_model(self, task: str | None, device: torch.device) -> Any:
        """An expert, or the base if `task` is None, with all its weights, in float32 and eval mode."""
        model = self.skeleton()
        read = self.base_tensor if task is None else lambda name: self.expert_tensor(task, name)
        materialize(model, self.names, read, device)
        tie(model, self.tied)
        return model.to(device)

    def check_finite(self) -> Iterator[None]:
        """Look through all weights for NaN and Inf, one checkpoint a step.

        Raises:
            ValueError: file and tensor are named.
        """
        self.base.check_finite(list(self._stored.values()))
        yield
        for task, expert in self.experts.items():
            expert.check_finite(list(self._expert_stored[task].values()))
            yield

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """Pass on what was made of the weights of one name, or say which of them has NaN or Inf.

        Every method of merging passes them on to its result, so one look at that does for all weights.

        Raises:
            ValueError: file and tensor are named.
        """
        if not is_finite(tensor):
            self.base.check_finite([self._stored[name]])
            for task, expert in self.experts.items():
                expert.check_finite([self._expert_stored[task][name]] if name in self._expert_stored[task] else [])
        return tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the base's weights have on disk."""
        kinds = [self.base.dtype(self._stored[name]) for name in self.names]
        floats = [kind for kind in kinds if kind is not None]
        return max(set(floats), key=floats.count)

    def block_names(self, block: str) -> list[str]:
        """Names of the tensors of one block."""
        return [name for name in self.names if name.startswith(block + ".")]

    def outside_names(self) -> list[str]:
        """Names of the tensors that lie in no block."""
        prefixes = tuple(stack.name + "." for stack in find_stacks(self.model))
        return [name for name in self.names if not name.startswith(prefixes)]

    def stored_name(self, name: str) -> str:
        """What the base calls a tensor on disk; outputs keep these names."""
        return self._stored[name]

    def form(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the base's header; the merged model's are the same."""
        return self.base.spec(self._stored[name])

    def base_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the base's header."""
        return self.base.shape(self._stored[name])

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of one of the base's tensors on disk; None if it is not a float."""
        return self.base.dtype(self._stored[name])

    def base_tensor(self, name: str) -> Tensor:
        """A tensor of the base, in the dtype on disk."""
        return self.base.tensor(self._stored[self.tied.get(name, name)])

    def expert_tensor(self, task: str, name: str) -> Tensor:
        """A tensor of an expert, in the dtype on disk; the base's where the expert has none.

        What an adapter changes is float32.
        """
        expert, stored = self.experts[task], self._expert_stored[task].get(name)
        if stored is None:
            return self.base_tensor(name)
        if not isinstance(expert, Adapter):
            return expert.tensor(stored)
        start = expert.tensor(stored) if expert.replaces(stored) else self.base_tensor(name)
        return adapters.apply(start, expert.change(stored), self._transposed(name)) if expert.changes(stored) else start

    def head_tensors(self, task: str) -> dict[str, Tensor]:
        """Tensors of an expert that the base does not have: its own task head, with the names on disk."""
        if self._heads[task] is None:
            return {}
        return {name: self.experts[task].tensor(name) for name in self._head_names(task)}

    def head_config(self, task: str) -> dict[str, Any] | None:
        """Content of a `config.json` for an expert's own task head; None if it has none."""
        return self._heads[task]

    def _head_names(self, task: str) -> list[str]:
        own = [stored for name, stored in self._expert_stored[task].items() if name in self.absent]
        return self._expert_extra[task] + own

    def _find_head(self, task: str) -> dict[str, Any] | None:
        expert = self.experts[task]
        if not self._expert_extra[task]:
            return None
        if isinstance(expert, Adapter):
            tensors = {name: expert.tensor(name) for name in self._head_names(task)}
            return adapters.task_head_config(expert, self.base.config, tensors, self.absent)
        architecture = architecture_of(expert.config)
        if not has_task_head(architecture):
            return None
        if named_class(architecture) is None:
            self.notes.append(f"expert {task}: transformers has no class {architecture}, its head is left out")
            return None
        return expert.config

    def merged(self, name: str) -> Tensor:
        """A tensor of the merged model, in the base's dtype. Integer buffers are the base's."""
        if self._at_once(name):
            return next(self.merged_parts(name))
        merged = torch.empty(self.base_shape(name), dtype=self.stored_dtype(name))
        for rows, part in zip(self._rows(name), self.merged_parts(name)):
            merged[rows] = part
        return merged

    def merged_parts(self, name: str) -> Iterator[Tensor]:
        """As `merged`, a large tensor some rows at a time.

        That is how it is read, too: what was read of a file is resident until its map is closed.

        Raises:
            ValueError: a weight is NaN or Inf; file and tensor are named.
        """
        if self.stored_dtype(name) is None:
            yield self.base_tensor(name)
            return
        method, settings = METHODS[self.recipe.merge.method], self._settings(name)
        if self._at_once(name):
            experts = [self.expert_tensor(task, name) for task in self.experts]
            yield self._finite(name, method(self.base_tensor(name), experts, **settings))
            return
        for rows in self._rows(name):
            experts = [self.expert_rows(task, name, rows) for task in self.experts]
            yield self._finite(name, method(self.base_rows(name, rows), experts, **settings))

    def _at_once(self, name: str) -> bool:
        """Whether a tensor is merged as a whole: a small one is, and DARE's draw is one for the whole tensor."""
        large = self.stored_dtype(name) is not None and math.prod(self.base_shape(name)) > ROWS
        return not large or self.recipe.merge.method == "dare"

    def _rows(self, name: str) -> Iterator[slice]:
        """The rows of a tensor in portions."""
        count, *rest = self.base_shape(name) or (1,)
        step = max(1, ROWS // max(1, math.prod(rest)))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def base_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of `base_tensor`, along the first dimension on disk."""
        return self.base.rows(self._stored[self.tied.get(name, name)], rows)

    def expert_rows(self, task: str, name: str, rows: slice) -> Tensor:
        """Some rows of `expert_tensor`, along the first dimension on disk."""
        expert, stored = self.experts[task], self._expert_stored[task].get(name)
        if stored is None:
            return self.base_rows(name, rows)
        if not isinstance(expert, Adapter):
            return expert.rows(stored, rows)
        start = expert.tensor(stored)[rows] if expert.replaces(stored) else self.base_rows(name, rows)
        if not expert.changes(stored):
            return start
        if self._transposed(name):
            return adapters.apply(start, expert.change(stored, columns=rows), transposed=True)
        return adapters.apply(start, expert.change(stored, rows), transposed=False)

    def _settings(self, name: str) -> dict[str, Any]:
        settings = self.recipe.merge.settings()
        if self.recipe.merge.method == "dare":
            settings |= {"seed": self.recipe.seed, "name": name}
        if self.recipe.merge.method == "ties":
            whole = self.recipe.merge.trim == "model"
            if whole and self._thresholds is None:
                self._thresholds = self._find_thresholds(self.names, settings["density"])
            settings["thresholds"] = self._thresholds or self._find_thresholds([name], settings["density"])
        return settings

    def _find_thresholds(self, names: Sequence[str], density: float) -> list[float]:
        """Each expert's threshold over some tensors."""
        floats = [name for name in names if self.stored_dtype(name) is not None]
        return [magnitude_threshold(partial(self._pairs, task, floats), density) for task in self.experts]

    def _pairs(self, task: str, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        for name in names:
            if not self.base_shape(name):
                pairs = iter([(self.base_tensor(name), self.expert_tensor(task, name))])
            else:
                pairs = ((self.base_rows(name, rows), self.expert_rows(task, name, rows)) for rows in self._rows(name))
            for base, expert in pairs:
                yield self._finite(name, base), self._finite(name, expert)
