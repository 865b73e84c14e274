"""Base and experts as readers of tensors, one at a time, by the names that the tensors have in the shared model."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq.errors import error_context
from epmq.merging.ties import asked_fields, follow_ties, is_one, own_ties
from epmq.merging.token_rows import TokenRows, Vocabulary
from epmq.models import classes, meta
from epmq.models.adapter import Adapter, is_adapter
from epmq.models.adapter_head import AdapterHead, adapter_head
from epmq.models.blocks import LINEAR, find_stacks, is_transposed
from epmq.models.checkpoint import DTYPE_NAMES, DTYPES, FLOATS, Checkpoint, TensorSpec, architecture_of, resolve
from epmq.models.config import changed
from epmq.models.heads import HEAD_FILE, Head
from epmq.models.initial import fill_absent, initial_values
from epmq.models.multitask import NativeHead, load_any_head
from epmq.notes import Notes
from epmq.recipe import Expert

CPU = torch.device("cpu")
# How the names of embeddings end.
TABLES = ("embeddings.weight", "embed_tokens.weight")


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

    def __init__(self, checkpoint: Checkpoint, experts: "ExpertSet") -> None:
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

    def __init__(self, expert: Expert, checkpoint: Checkpoint, experts: "ExpertSet") -> None:
        self.task, self.checkpoint, self.path = expert.name, checkpoint, checkpoint.path
        self.adapter = checkpoint if isinstance(checkpoint, Adapter) else None
        self.stored, self.extra, self.ties = experts.read(checkpoint)
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
            return _rows(self._set.initial[name], rows)
        if stored is None:
            return self._base.own(name, rows)
        if adapter is None:
            return self.checkpoint.tensor(stored, rows)
        start = adapter.tensor(stored, rows) if adapter.replaces(stored) else self._base.own(name, rows)
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
        return adapter_head(self.adapter, self._base.checkpoint, self.own_head_names, self._set.absent)

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
        return {name: stored[name] for name in ties if name in stored.keys() - held and not name.startswith(inside)}

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
        names: tensors of the model that are merged, as `state_dict` calls them, without tied copies.
        tied: tensors that share another one's storage in base and experts alike: name → the name it follows.
        absent: tensors of the model that the base lacks and that are not merged, such as a pooler.
        initial: values that the class gives to tensors which files lack, where it computes them; all other `absent`
            ones are zero.
        computed: those that the class does not expect in a file, such as sinusoidal positions.
        written: names → names on disk in what is written.
        notes: fallbacks taken; they go into the report.
        vocabulary: the tokens of the merged model.
        changes: fields of that config that have another value than in its file, by name.
        shares_part: only a part of the base is merged.
    """

    def __init__(self, source: str, experts: Sequence[Expert], changes: Mapping[str, Any] | None = None) -> None:
        self.source, self.notes, self.vocabulary, self.changes = source, Notes(), Vocabulary(), changes or {}
        checkpoint = Checkpoint(source)
        paths = {expert.name: resolve(expert.model) for expert in experts}
        opened = {task: Adapter(path) if is_adapter(path) else Checkpoint(path) for task, path in paths.items()}
        full = {task: expert for task, expert in opened.items() if not isinstance(expert, Adapter)}
        self._name_classes(checkpoint, full)
        self._shared, self._first_only = meta.shared_checkpoint(checkpoint, list(full.values())), False
        self._class = classes.shared_class(self._shared, list(full.values()))
        self._token_count: int | None = None
        self.model = meta.build_meta_model(self._shared, self._class)
        if self.changes:
            self._shared.config = changed(self._shared.config, type(self.model.config), self.changes)
            self.model = meta.build_meta_model(self._shared, self._class)
        self.config, self.shares_part = self._shared.config, self._shared is not checkpoint
        self.base = BaseReader(checkpoint, self)
        self.experts = {expert.name: ExpertReader(expert, opened[expert.name], self) for expert in experts}
        state = list(self.model.state_dict())
        self.absent = [name for name in state if name not in self.base.stored]
        self._find_initial_values()
        self._stand_in()
        self.tied = self._shared_ties()
        names = [name for name in state if name not in self.tied]
        self.names = [name for name in names if name in self.base.stored or name in self.base.stand_ins]
        self.absent = [name for name in names if name not in self.names]
        self.written = self._written_names()
        fill_absent(self.model, self.absent, self.initial, CPU)

    def _name_classes(self, base: Checkpoint, experts: dict[str, Checkpoint]) -> None:
        for who, checkpoint in {"the base": base, **{f"expert {task}": one for task, one in experts.items()}}.items():
            with error_context(checkpoint.path / checkpoint.CONFIG):
                note = classes.name_class(checkpoint, must=checkpoint is not base)
            if note is not None:
                self.notes.append(f"{who}: {note}")

    def read(self, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str], dict[str, str]]:
        """How a checkpoint is read, by its own config: as `BaseReader`'s `stored`, `extra` and `ties`."""
        with error_context(str(checkpoint.path)):
            stored, extra = meta.rename(self.model, checkpoint.names)
        ties = {} if isinstance(checkpoint, Adapter) else own_ties(self.model, checkpoint)
        follow_ties(stored, ties)
        return stored, extra, ties

    def _find_initial_values(self) -> None:
        lacking = [expert.stored for expert in self.experts.values() if expert.adapter is None]
        unstored = {name for name in self.model.state_dict() if any(name not in stored for stored in lacking)}
        computed = {name for name in {*unstored, *self.absent} if classes.is_expected_missing(self.model, name)}
        with error_context(str(self.base.path)):
            inside = tuple(stack.name + "." for stack in find_stacks(self.model))
        # A block's weight or a large table that is not there is an error, and need not be made.
        large = (*inside, *self.output_layer())
        started = {name for name in self.absent if not name.startswith(large) and not name.endswith(TABLES)}
        self.initial = initial_values(self.model, computed | started)
        self.computed = computed & self.initial.keys()

    def _stand_in(self) -> None:
        """Find what is merged although the base's file lacks it: what an expert holds of its own.

        That is a tensor with an initial value, which an expert has changed; and an output layer that the base's class
        does not have, where experts bring theirs: their mean stands for the base's.
        """
        full = [expert for expert in self.experts.values() if expert.adapter is None]
        own = meta.named_class(architecture_of(self.base.checkpoint.config))
        without_output = own is not None and not meta.is_generator(own.__name__)
        for name in self.absent:
            holders = [expert for expert in full if name in expert.stored]
            if name in self.initial:
                value = self.initial[name]
                if any(not torch.equal(expert.tensor(name).to(value.dtype), value) for expert in holders):
                    self.base.stand_ins[name] = partial(_rows, value)
            elif holders and without_output and meta.is_generator(self._class.__name__):
                self.base.stand_ins[name] = partial(_mean, name, holders)

    def _shared_ties(self) -> dict[str, str]:
        """What the base holds as one tensor, and every expert too.

        What the config ties but a file holds with two values is two, as `from_pretrained` reads it: FLAN-T5 is such a
        model, since transformers 5 ties every T5, whatever its config says.
        """
        readers: list[BaseReader | ExpertReader] = [self.base, *self.experts.values()]
        ties = self.base.ties.items()
        return {name: leader for name, leader in ties if all(is_one(reader, name, leader) for reader in readers)}

    def _written_names(self) -> dict[str, str]:
        """The base's names on disk; the model's own for a tensor that the base has only as another one, or not."""
        own = meta.rename(self.model, self.base.checkpoint.names)[0]
        taken, written = {own[name] for name in self.names if name in own}, dict[str, str]()
        for name in self.names:
            stored = own.get(name, self.base.stored.get(name, name))
            written[name] = name if name not in own and stored in taken else stored
            taken.add(written[name])
        return written

    @property
    def is_untied(self) -> bool:
        """Whether nothing is tied that the config ties, and the config may say so.

        Where a part stays tied, or the model computes otherwise when it is not, the file holds both values, and the
        config stays: `from_pretrained` takes what it finds.
        """
        return bool(meta.tied_names(self.model)) and not self.tied and not asked_fields(self.model)

    def resize(self, tokens: int) -> None:
        """Let the model have a vocabulary of another size."""
        self._token_count = tokens
        self.model = self.meta_model()
        self.config = meta.text_config(self.config, self.model, vocab_size=tokens)

    def meta_model(self, tokens: int | None = None) -> Any:
        """Another copy of the model without its weights; `tokens` is the size of another vocabulary."""
        model = meta.build_meta_model(self._shared, self._class, tokens or self._token_count)
        fill_absent(model, self.absent, self.initial, CPU)
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

    def output_layer(self) -> list[str]:
        """Names of the output layer's tensors, where the model generates text."""
        output: Any = self.model.get_output_embeddings() if meta.is_generator(type(self.model).__name__) else None
        paths = [path for path, module in self.model.named_modules() if module is output]
        return [f"{path}.{leaf}" for path in paths for leaf, _ in output.named_parameters()]

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


def _rows(whole: Tensor, rows: slice | None) -> Tensor:
    return whole if rows is None else whole[rows]


def _mean(name: str, experts: Sequence[ExpertReader], rows: slice | None) -> Tensor:
    """The mean of what experts have of their own, in float32."""
    total = sum(expert.own(name, rows).float() for expert in experts)
    assert isinstance(total, Tensor)
    return total / len(experts)
