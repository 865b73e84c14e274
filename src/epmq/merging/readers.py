"""Base and experts as readers of tensors, one at a time, by the names that the tensors have in the shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from epmq.merging.ties import follow_ties
from epmq.merging.token_rows import TokenRows
from epmq.models import classes, meta
from epmq.models.adapter import Adapter
from epmq.models.adapter_head import AdapterHead, adapter_head
from epmq.models.blocks import LINEAR, is_transposed
from epmq.models.checkpoint import DTYPE_NAMES, DTYPES, FLOATS, Checkpoint, TensorSpec, architecture_of
from epmq.models.heads import HEAD_FILE, Head
from epmq.models.multitask import NativeHead, load_any_head
from epmq.notes import Notes
from epmq.recipe import Expert

if TYPE_CHECKING:
    from epmq.merging.experts import ExpertSet


class TensorReader(Protocol):
    """What gives the tensors of one model: the base, an expert, or the merge of them."""

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model, in the dtype it is stored in (what an adapter changes is float32)."""


class BaseReader:
    """Tensors of the base.

    Attributes:
        stored: name in the model → name on disk of the tensor that it reads; what is tied reads the same.
        extra: names on disk that the model does not have.
        ties: what the base's own config ties: name → the name it follows.
        stand_ins: what is read for tensors that the base's file lacks.
        tokens: where the merged model's tables of tokens have other rows.
    """

    def __init__(self, checkpoint: Checkpoint, experts: ExpertSet) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.stored, self.extra, self.ties = experts.read(checkpoint)
        self.stand_ins: dict[str, Callable[[slice | None], Tensor]] = {}
        self.tokens: TokenRows | None = None
        self._model = experts.model

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor in the dtype on disk, or some rows of it, along its first dimension."""
        if self.tokens is not None and name in self.tokens.tables:
            return self.tokens.tensor(name, rows)
        return self.own(name, rows)

    def own(self, name: str, rows: slice | None = None) -> Tensor:
        """As `tensor`, with the base's own rows of tokens."""
        stand_in = self.stand_ins.get(name)
        return self.checkpoint.tensor(self.stored[name], rows) if stand_in is None else stand_in(rows)

    def token_rows(self, name: str, positions: Tensor) -> Tensor:
        """Rows of some of the merged model's tokens in a table of tokens."""
        assert self.tokens is not None
        return self.tokens.at(name, positions)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header; the merged model's are the same."""
        dtype, shape = self._own_spec(name)
        return dtype, shape if self.tokens is None else self.tokens.shape(name, shape)

    def _own_spec(self, name: str) -> TensorSpec:
        if name not in self.stand_ins:
            return self.checkpoint.spec(self.stored[name])
        tensor = self._model.state_dict()[name]
        floats = (self.dtype(other) for other in self.stored if other not in self.stand_ins)
        dtype = next((found for found in floats if found is not None), torch.float32)
        return DTYPE_NAMES[dtype if tensor.is_floating_point() else tensor.dtype], tuple(tensor.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spec(name)[1]

    def dtype(self, name: str) -> torch.dtype | None:
        """Float dtype of a tensor on disk; None for any other."""
        dtype = self.spec(name)[0]
        return DTYPES[dtype] if dtype in FLOATS else None

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """As `Checkpoint.check_finite`, by the names in the model."""
        names = self.stored if names is None else [name for name in names if name in self.stored]
        self.checkpoint.check_finite(dict.fromkeys(self.stored[name] for name in names))


class ExpertReader:
    """Tensors of one expert, be it a checkpoint or an adapter; the base's where the expert has none.

    Attributes:
        task: its name.
        checkpoint: its file.
        adapter: the same, where it is one.
        stored: name in the model → name on disk; what the expert's own config ties has the same.
        extra: names on disk that the model does not have, such as a head's.
        ties: as in `BaseReader`; an adapter has none of its own.
        left_out: those of `extra` that go nowhere.
        head_file: the head that its recipe names, or that lies beside its weights; None where there is none.
    """

    def __init__(self, expert: Expert, checkpoint: Checkpoint, experts: ExpertSet) -> None:
        self.task, self.checkpoint, self.path = expert.name, checkpoint, checkpoint.path
        self.adapter = checkpoint if isinstance(checkpoint, Adapter) else None
        self.stored, self.extra, self.ties = experts.read(checkpoint, experts.base)
        self.left_out: list[str] = []
        self._base, self._model, self._set = experts.base, experts.model, experts
        beside = self.path / HEAD_FILE
        self.head_file = Path(expert.head) if expert.head else beside if beside.exists() else None
        self.tokens: TokenRows | None = None  # where the merged model's tables of tokens have other rows

    def has(self, name: str) -> bool:
        """Whether a tensor is the expert's own, and not just the base's; an adapter's are, whatever it changes."""
        return self.adapter is not None or name in self.stored or name in self._set.computed

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor in the dtype on disk, or some rows of it; what an adapter changes is W + ΔW in float32."""
        if not self.has(name):
            return self._base.tensor(name, rows)
        if self.tokens is not None and name in self.tokens.tables:
            return self.tokens.tensor(name, rows)
        return self.own(name, rows)

    def own(self, name: str, rows: slice | None = None) -> Tensor:
        """As `tensor`, with the expert's own rows of tokens."""
        stored, adapter = self.stored.get(name), self.adapter
        if stored is None and adapter is None and name in self._set.computed:
            return rows_of(self._set.initial[name], rows)
        if stored is None:
            return self._base.own(name, rows)
        if adapter is None:
            return self.checkpoint.tensor(stored, rows)
        start = adapter.tensor(stored, rows) if adapter.replaces(stored) else self._base.own(name, rows)
        if not adapter.changes(stored):
            return start
        return start.float() + adapter.change(stored, self.is_transposed(name), rows)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """s·B [out, r] and A [r, in] in float32, where an adapter adds their product to the base's tensor, and no more.

        Rank 0 stands for a tensor that the adapter leaves alone; None for any other expert.
        """
        if self.adapter is None:
            return None
        stored = self.stored.get(name)
        if stored is None:
            shape = self._base.shape(name)
            rows, columns = reversed(shape) if self.is_transposed(name) else shape
            return torch.zeros(rows, 0), torch.zeros(0, columns)
        if self.adapter.replaces(stored):
            return None
        scale, up, down = self.adapter.factors(stored)
        return scale * up, down

    def is_transposed(self, name: str) -> bool:
        """Whether a module stores a weight as [in, out], or is an embedding: an adapter's change is then turned."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        return is_transposed(module) if isinstance(module, LINEAR) else isinstance(module, nn.Embedding)

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """As `BaseReader.check_finite`, of what the expert has of its own."""
        names = self.stored if names is None else [name for name in names if name in self.stored]
        self.checkpoint.check_finite(dict.fromkeys(self.stored[name] for name in names))

    @property
    def own_head_names(self) -> list[str]:
        """Names on disk of tensors that the base does not have, such as the expert's own task head's."""
        names = [name for name in self.extra if name not in self.left_out]
        return names + [stored for name, stored in self.stored.items() if name in self._set.absent]

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors that the base does not have, with the names on disk; of an adapter, the head's."""
        if self.adapter is None:
            tensors = {name: self.checkpoint.tensor(name) for name in self.own_head_names}
            tensors |= {name: self.checkpoint.tensor(stored).clone() for name, stored in self._head_ties.items()}
        else:
            tensors = {} if self.adapter_head is None else self.adapter_head.tensors
        return tensors if self.tokens is None else self.tokens.of_head(tensors)

    @cached_property
    def adapter_head(self) -> AdapterHead | None:
        """The task head of an adapter; one that fits no task class is an InputError."""
        if self.adapter is None:
            return None
        shared = self._model.state_dict().keys() - set(self._set.absent)
        return adapter_head(self.adapter, self._base.checkpoint, self.own_head_names, shared)

    @cached_property
    def _head_ties(self) -> dict[str, str]:
        """What the expert's class ties in its head and its file lacks, such as a masked language model's output layer.

        Name in that class → name on disk of what it is tied to. On the merged model it would be tied to another tensor.
        """
        config = self.head_config
        if config is None:
            return {}
        own = classes.outline(
            meta.named_class(config["architectures"][0]), classes.config_of(self.checkpoint), self.checkpoint
        )
        stored, ties = meta.rename(own, self.checkpoint.names)[0], meta.tied_names(own)
        held, inside = set(stored), f"{own.base_model_prefix}."
        follow_ties(stored, ties)
        shared, lacking = self._model.state_dict(), stored.keys() - held
        heads = (name for name in ties if name not in shared and not name.startswith(inside))
        return {name: stored[name] for name in heads if name in lacking}

    @cached_property
    def head_config(self) -> dict[str, Any] | None:
        """Content of a `config.json` for the expert's own task head; None if it has none.

        An adapter that brings a head that fits no task class is an InputError.
        """
        if self.adapter is not None:
            return None if self.adapter_head is None else self._renumbered(self.adapter_head.config)
        if not self.extra:
            return None
        architecture = architecture_of(self.checkpoint.config)
        known = meta.has_task_head(architecture) and meta.named_class(architecture)
        return self._renumbered(self.checkpoint.config) if known else None

    def _renumbered(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of a head with the merged model's numbers of tokens."""
        vocabulary = self._set.vocabulary
        if self.tokens is not None:
            config = meta.text_config(config, self._model, vocab_size=len(self.tokens.index))
        if self.task not in vocabulary.theirs:
            return config
        config = vocabulary.renumbered(self.task, config)
        return config if vocabulary.pad is None else {**config, "pad_token_id": vocabulary.pad}

    def leave_out_head(self) -> None:
        """Go on as if the expert had no head of its own."""
        self.__dict__["head_config"] = None  # in the place of what was found

    @property
    def has_head(self) -> bool:
        return self.head_file is not None or self.head_config is not None

    def head(self, backbone: nn.Module) -> Head | NativeHead | None:
        """The expert's head on a backbone; None where it has none, and an InputError where it cannot be built."""
        if self.head_file is not None:
            return load_any_head(self.head_file, backbone)
        config = self.head_config
        return None if config is None else NativeHead(backbone, config["architectures"][0], config, self.head_tensors())


def guiding_head(expert: ExpertReader, notes: Notes, backbone: nn.Module) -> Head | NativeHead | None:
    """An expert's head on a backbone; one that cannot be built is noted and carried over, and guides nothing."""
    try:
        return expert.head(backbone)
    except ValueError as error:
        notes.depart(f"expert {expert.task}: its scores cannot guide ({error})")
        return None


def rows_of(whole: Tensor, rows: slice | None) -> Tensor:
    """Some rows of a tensor, or the whole."""
    return whole if rows is None else whole[rows]
