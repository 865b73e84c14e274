"""The merged model and the experts as sources of tensors, read and merged one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from epmq.blocks import find_stacks
from epmq.checkpoint import Checkpoint
from epmq.merging import METHODS, ThresholdSearch
from epmq.skeleton import build_skeleton, has_task_head, rename, tied_names
from epmq.spec import Recipe


class Sources:
    """Base and experts of a recipe, opened and checked.

    Attributes:
        base: the base checkpoint.
        model: its skeleton.
        experts: task name → the expert's checkpoint.
        names: tensors of the model, as `state_dict` calls them, without tied copies.
        notes: fallbacks taken, in words; they go into the report.

    Raises:
        ValueError, FileNotFoundError: a checkpoint is missing, or does not fit the base; the tensor and both shapes
            are named.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.notes: list[str] = []
        self.base = Checkpoint(recipe.base)
        self.model = build_skeleton(self.base)
        self.experts = {expert.name: Checkpoint(expert.model) for expert in recipe.experts}
        self._stored = self._rename(self.base)[0]
        renamed = {task: self._rename(expert) for task, expert in self.experts.items()}
        self._expert_stored = {task: stored for task, (stored, _) in renamed.items()}
        self._expert_extra = {task: extra for task, (_, extra) in renamed.items()}
        tied = tied_names(self.model)
        state = self.model.state_dict()
        self.names = [name for name in state if name not in tied]
        self._thresholds: list[float] | None = None
        for name in self.names:
            if name not in self._stored:
                raise ValueError(f"{self.base.path}: no tensor for {name!r} of {type(self.model).__name__}")
            found, wanted = list(self.base.shape(self._stored[name])), list(state[name].shape)
            if found != wanted:
                raise ValueError(f"{self.base.path}: tensor {name!r} is {found}, but {wanted} by config.json")
        for task in self.experts:
            self._check_expert(task)

    def _rename(self, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
        try:
            return rename(self.model, checkpoint.names)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}") from None

    def _check_expert(self, task: str) -> None:
        expert, stored = self.experts[task], self._expert_stored[task]
        ours, theirs = self.base.config.get("model_type"), expert.config.get("model_type")
        if ours != theirs:
            raise ValueError(f"expert {task}: model type {theirs!r}, but the base is {ours!r} ({expert.path})")
        if not stored:
            raise ValueError(f"expert {task}: shares no tensor with the base ({expert.path})")
        for name in self.names:
            wanted = self.base.shape(self._stored[name])
            if name not in stored:
                if any(part.isdigit() for part in name.split(".")):
                    raise ValueError(f"expert {task}: tensor {name!r} is missing in {expert.path}")
                self.notes.append(f"expert {task} has no tensor {name}: the base's takes its place")
            elif expert.shape(stored[name]) != wanted:
                found = list(expert.shape(stored[name]))
                raise ValueError(
                    f"expert {task}: tensor {name!r} is {found}, but {list(wanted)} in the base ({expert.path})"
                )

        for stack in find_stacks(self.model):
            block = re.compile(rf"(?:^|\.){re.escape(stack.name)}\.(\d+)\.")
            for name in self._expert_extra[task]:
                index = block.search(name)
                if index and int(index[1]) >= len(stack.blocks) and name not in self.base:
                    raise ValueError(f"expert {task}: tensor {name!r} has no counterpart in the base ({expert.path})")

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype most of the base's weights have on disk."""
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

    def base_tensor(self, name: str) -> Tensor:
        """A tensor of the base, in the dtype on disk."""
        return self.base.tensor(self._stored[name])

    def expert_tensor(self, task: str, name: str) -> Tensor:
        """A tensor of an expert, in the dtype on disk; the base's where the expert has none."""
        stored = self._expert_stored[task]
        return self.experts[task].tensor(stored[name]) if name in stored else self.base_tensor(name)

    def head_tensors(self, task: str) -> dict[str, Tensor]:
        """Tensors of an expert that the shared model does not have: its own task head, with the names on disk."""
        if not has_task_head((self.experts[task].config.get("architectures") or [None])[0]):
            return {}
        return {name: self.experts[task].tensor(name) for name in self._expert_extra[task]}

    def merged(self, name: str) -> Tensor:
        """A tensor of the merged model, in the base's dtype. Integer buffers are the base's."""
        base = self.base_tensor(name)
        if not torch.is_floating_point(base):
            return base
        experts = [self.expert_tensor(task, name) for task in self.experts]
        return METHODS[self.recipe.merge.method](base, experts, **self._settings(name)).to(base.dtype)

    def _settings(self, name: str) -> dict[str, Any]:
        settings = self.recipe.merge.settings()
        if self.recipe.merge.method == "dare":
            settings |= {"seed": self.recipe.seed, "name": name}
        if self.recipe.merge.method == "ties" and self.recipe.merge.trim == "model":
            if self._thresholds is None:
                self._thresholds = [self._find_threshold(task, settings["density"]) for task in self.experts]
            settings["thresholds"] = self._thresholds
        return settings

    def _find_threshold(self, task: str, density: float) -> float:
        search = ThresholdSearch(density)
        for last in (False, True):
            for name in self.names:
                base = self.base_tensor(name)
                if torch.is_floating_point(base):
                    search.add(self.expert_tensor(task, name).float() - base.float())
            if not last:
                search.narrow()
        return search.threshold()
