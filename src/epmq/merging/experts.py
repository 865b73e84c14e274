"""Base and experts as readers of tensors, one at a time, by the names that the tensors have in the shared model."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq.errors import error_context
from epmq.models import meta
from epmq.models.adapter import Adapter, is_adapter
from epmq.models.adapter_head import AdapterHead, adapter_head
from epmq.models.blocks import LINEAR, find_stacks, is_transposed
from epmq.models.checkpoint import Checkpoint, TensorSpec, architecture_of, resolve
from epmq.models.config import changed
from epmq.models.heads import HEAD_FILE, Head
from epmq.models.multitask import NativeHead, load_any_head
from epmq.notes import Notes
from epmq.recipe import Expert


class TensorReader(Protocol):
    """What gives the tensors of one model: the base, an expert, or the merge of them."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model, in the dtype it is stored in (what an adapter changes is float32)."""


class BaseReader:
    """Tensors of the base; `stored` and `tied` as in `ExpertSet.rename` and `ExpertSet`."""

    def __init__(self, checkpoint: Checkpoint, stored: dict[str, str], tied: dict[str, str]) -> None:
        self.checkpoint, self.path, self.stored, self._tied = checkpoint, checkpoint.path, stored, tied

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor in the dtype on disk, or some rows of it, along its first dimension."""
        return self.checkpoint.tensor(self.stored[self._tied.get(name, name)], rows)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header; the merged model's are the same."""
        return self.checkpoint.spec(self.stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spec(name)[1]

    def dtype(self, name: str) -> torch.dtype | None:
        """Float dtype of a tensor on disk; None for any other."""
        return self.checkpoint.dtype(self.stored[name])

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """As `Checkpoint.check_finite`, by the names in the model."""
        self.checkpoint.check_finite([self.stored[name] for name in (self.stored if names is None else names)])


class ExpertReader:
    """Tensors of one expert, be it a checkpoint or an adapter; the base's where the expert has none.

    Attributes:
        task: its name.
        checkpoint: its file.
        adapter: the same, where it is one.
        stored: name in the model → name on disk.
        extra: names on disk that the model does not have, such as a head's.
        head_file: the head that its recipe names, or that lies beside its weights; None where there is none.
    """

    def __init__(self, expert: Expert, checkpoint: Checkpoint, experts: "ExpertSet") -> None:
        self.task, self.checkpoint, self.path = expert.name, checkpoint, checkpoint.path
        self.adapter = checkpoint if isinstance(checkpoint, Adapter) else None
        self.stored, self.extra = experts.rename(checkpoint)
        self._base, self._model, self._absent = experts.base, experts.model, experts.absent
        beside = self.path / HEAD_FILE
        self.head_file = Path(expert.head) if expert.head else beside if beside.exists() else None

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor in the dtype on disk, or some rows of it; what an adapter changes is W + ΔW in float32."""
        stored, adapter = self.stored.get(name), self.adapter
        if stored is None:
            return self._base.tensor(name, rows)
        if adapter is None:
            return self.checkpoint.tensor(stored, rows)
        start = adapter.tensor(stored, rows) if adapter.replaces(stored) else self._base.tensor(name, rows)
        if not adapter.changes(stored):
            return start
        return start.float() + adapter.change(stored, self.is_transposed(name), rows)

    def is_transposed(self, name: str) -> bool:
        """Whether a module stores a weight as [in, out], or is an embedding: an adapter's change is then turned."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        return is_transposed(module) if isinstance(module, LINEAR) else isinstance(module, nn.Embedding)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """As `BaseReader.check_finite`, of what the expert has of its own."""
        names = self.stored if names is None else [name for name in names if name in self.stored]
        self.checkpoint.check_finite([self.stored[name] for name in names])

    @property
    def own_head_names(self) -> list[str]:
        """Names on disk of tensors that the base does not have, such as the expert's own task head's."""
        return self.extra + [stored for name, stored in self.stored.items() if name in self._absent]

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors that the base does not have, with the names on disk; of an adapter, the head's."""
        if self.adapter is not None:
            return {} if self.adapter_head is None else self.adapter_head.tensors
        return {name: self.checkpoint.tensor(name) for name in self.own_head_names}

    @cached_property
    def adapter_head(self) -> AdapterHead | None:
        """The task head of an adapter; one that fits no task class is an InputError."""
        if self.adapter is None:
            return None
        return adapter_head(self.adapter, self._base.checkpoint, self.own_head_names, self._absent)

    @cached_property
    def head_config(self) -> dict[str, Any] | None:
        """Content of a `config.json` for the expert's own task head; None if it has none.

        An adapter that brings a head that fits no task class is an InputError.
        """
        if self.adapter is not None:
            return None if self.adapter_head is None else self.adapter_head.config
        if not self.extra:
            return None
        architecture = architecture_of(self.checkpoint.config)
        return self.checkpoint.config if meta.has_task_head(architecture) and meta.named_class(architecture) else None

    @property
    def has_head(self) -> bool:
        return self.head_file is not None or self.head_config is not None

    def head(self, backbone: nn.Module) -> Head | NativeHead | None:
        """The expert's head on a backbone; None where it has none, and an InputError where it cannot be built."""
        if self.head_file is not None:
            return load_any_head(self.head_file, backbone)
        config = self.head_config
        return None if config is None else NativeHead(backbone, config["architectures"][0], config, self.head_tensors())


class ExpertSet:
    """A base and its experts, opened; `epmq.merging.compatibility.open_experts` also checks that they fit.

    Attributes:
        source: directory or Hub id of the base.
        base: reader of the base.
        experts: task name → reader of the expert.
        config: content of the `config.json` of what base and experts share.
        model: that model without its weights.
        names: tensors of the model that the base has, as `state_dict` calls them, without tied copies.
        tied: tensors that share another one's storage in the base: name → the name it follows.
        absent: tensors of the model outside its blocks that the base lacks, such as a pooler; they are zero.
        notes: fallbacks taken; they go into the report.
        changes: fields of that config that have another value than in its file, by name.
        shares_part: only a part of the base is merged.
    """

    def __init__(self, source: str, experts: Sequence[Expert], changes: Mapping[str, Any] | None = None) -> None:
        self.source, self.notes = source, Notes()
        checkpoint = Checkpoint(source)
        paths = {expert.name: resolve(expert.model) for expert in experts}
        opened = {task: Adapter(path) if is_adapter(path) else Checkpoint(path) for task, path in paths.items()}
        full = [expert for expert in opened.values() if not isinstance(expert, Adapter)]
        self._shared, self._first_only = meta.shared_checkpoint(checkpoint, full), False
        self.model, self.changes = meta.build_meta_model(self._shared), changes or {}
        if self.changes:
            self._shared.config = changed(self._shared.config, type(self.model.config), self.changes)
            self.model = meta.build_meta_model(self._shared)
        self.config, self.shares_part = self._shared.config, self._shared is not checkpoint
        self.tied = meta.tied_names(self.model)
        self.base = BaseReader(checkpoint, self.rename(checkpoint)[0], self.tied)
        self._untie()
        state = [name for name in self.model.state_dict() if name not in self.tied]
        self.names = [name for name in state if name in self.base.stored]
        self.absent = [name for name in state if name not in self.base.stored]
        self.experts = {expert.name: ExpertReader(expert, opened[expert.name], self) for expert in experts}
        self._fill_absent(self.model)

    def rename(self, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
        """Name in the model → name on disk, and the names on disk that the model does not have."""
        with error_context(str(checkpoint.path)):
            stored, extra = meta.rename(self.model, checkpoint.names)
        if not isinstance(checkpoint, Adapter):
            for name, leader in self.tied.items():
                if name in stored:  # some files hold a shared tensor under another of its names
                    stored.setdefault(leader, stored[name])
        return stored, extra

    def _untie(self) -> None:
        """Let go of what the config ties but the base holds with different values, as `from_pretrained` does.

        FLAN-T5 is such a model: transformers 5 ties every T5, whatever its config says.
        """
        stored = self.base.stored
        for name, leader in list(self.tied.items()):
            pair = {stored[key] for key in (name, leader) if key in stored}
            if len(pair) == 2 and not torch.equal(*map(self.base.checkpoint.tensor, pair)):
                del self.tied[name]

    def _fill_absent(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if name in self.absent:
                meta.set_tensor(model, name, torch.zeros(tensor.shape))

    def meta_model(self) -> Any:
        """Another copy of the model without its weights."""
        model = meta.build_meta_model(self._shared)
        self._fill_absent(model)
        for stack in find_stacks(model) if self._first_only else ():
            del model.get_submodule(stack.name)[1:]
        return model

    def first_blocks(self) -> "ExpertSet":
        """The same with nothing but the first block of each stack, to see what a block costs."""
        first = copy.copy(self)
        first._first_only, first.notes = True, Notes()
        first.model = first.meta_model()
        first.names = list(filter(first.model.state_dict().__contains__, self.names))
        return first

    def whole_model(self, reader: TensorReader, device: torch.device) -> Any:
        """The model with all weights that a reader gives, in float32 and eval mode."""
        model = self.meta_model()
        meta.materialize(model, self.names, reader.tensor, device)
        meta.tie(model, self.tied)
        return model.to(device)

    def block_names(self, block: str) -> list[str]:
        """Names of the tensors of one block."""
        return [name for name in self.names if name.startswith(block + ".")]

    def outside_names(self) -> list[str]:
        """Names of the tensors that lie in no block."""
        prefixes = tuple(stack.name + "." for stack in find_stacks(self.model))
        return [name for name in self.names if not name.startswith(prefixes)]


def guiding_head(expert: ExpertReader, notes: Notes, backbone: nn.Module) -> Head | NativeHead | None:
    """An expert's head on a backbone; one that cannot be built is noted and carried over, and guides nothing."""
    try:
        return expert.head(backbone)
    except ValueError as error:
        notes.depart(f"expert {expert.task}: its scores cannot guide ({error})")
        return None
