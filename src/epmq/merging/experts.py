"""A base and its experts, opened: what they share, and how each is read."""

import copy
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epmq.errors import InputError, error_context
from epmq.merging.readers import BaseReader, ExpertReader, TensorReader, rows_of
from epmq.merging.ties import asked_fields, follow_ties, is_one, own_ties
from epmq.merging.token_rows import Vocabulary
from epmq.models import classes, meta
from epmq.models.adapter import Adapter, is_adapter
from epmq.models.blocks import find_stacks
from epmq.models.checkpoint import Checkpoint, architecture_of, resolve
from epmq.models.config import changed
from epmq.models.initial import fill_absent, initial_values
from epmq.models.parts import place
from epmq.models.pieces import piece_of
from epmq.models.towers import keep_first_blocks
from epmq.notes import Notes
from epmq.recipe import Expert

CPU = torch.device("cpu")
# Name in the model → name on disk; and the shapes that a tensor may have.
Names = dict[str, str]
Shapes = list[tuple[int, ...]]
# How the names of embeddings end.
TABLES = ("embeddings.weight", "embed_tokens.weight")


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
        self._note_wrappers(checkpoint, opened)
        self._name_classes(checkpoint, full)
        self._shared, self._first_only = classes.shared_checkpoint(checkpoint, list(full.values())), False
        self._class = classes.shared_class(self._shared, list(full.values()))
        self._token_count: int | None = None
        self.model = meta.build_meta_model(self._shared, self._class)
        if self.changes:
            self._shared.config = changed(self._shared.config, type(self.model.config), self.changes)
            self.model = meta.build_meta_model(self._shared, self._class)
        self.config, self.shares_part = self._shared.config, self._shared is not checkpoint
        if self.shares_part:
            self.notes.append(f"all experts are one part of the base, which alone is merged: {self._class.__name__}")
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

    def _note_wrappers(self, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
        for who, one in {"the base": base, **{f"expert {task}": one for task, one in experts.items()}}.items():
            if one.wrappers:
                self.notes.depart(f"{who}: taken off the names of its tensors: {', '.join(one.wrappers)}")

    def _name_classes(self, base: Checkpoint, experts: dict[str, Checkpoint]) -> None:
        for who, checkpoint in {"the base": base, **{f"expert {task}": one for task, one in experts.items()}}.items():
            with error_context(checkpoint.path / checkpoint.CONFIG):
                note = classes.name_class(checkpoint, must=checkpoint is not base)
            if note is not None:
                self.notes.append(f"{who}: {note}")

    def read(
        self, checkpoint: Checkpoint, base: BaseReader | None = None
    ) -> tuple[dict[str, str], list[str], dict[str, str]]:
        """How a checkpoint is read, by its own config: as `BaseReader`'s `stored`, `extra` and `ties`.

        `base` is that of an expert.
        """
        with error_context(str(checkpoint.path)):
            stored, extra = meta.rename(self.model, checkpoint.names)
            stored, extra = self._placed(checkpoint, stored, extra)
        ties = {} if isinstance(checkpoint, Adapter) else own_ties(self.model, checkpoint)
        if base is not None and not meta.is_generator(architecture_of(checkpoint.config) or ""):
            # What has no output layer follows the base, whose config may tie what its file holds apart.
            ties = {name: leader for name, leader in ties.items() if is_one(base, name, leader)}
        fused = next((piece.tensor for name in stored.values() if (piece := piece_of(name)) is not None), None)
        if fused is not None and isinstance(checkpoint, Adapter):
            raise InputError(f"{checkpoint.path}: it changes {fused!r}, which fuses experts: merge it with peft first")
        follow_ties(stored, ties)
        return stored, extra, ties

    def _placed(self, checkpoint: Checkpoint, stored: dict[str, str], extra: list[str]) -> tuple[Names, list[str]]:
        """As `meta.rename` gives it, with the names of a part: the checkpoint is one of the model, or the model of it.

        Raises:
            InputError: it may be one part or another.
        """
        blocks = tuple(f"{stack.name}." for stack in find_stacks(self.model))
        whole = not isinstance(checkpoint, Adapter)
        if whole and all(name in stored for name in self.model.state_dict() if name.startswith(blocks)):
            return stored, extra
        named = None if whole else (checkpoint.config.get("auto_mapping") or {}).get("base_model_class")
        own, left = self._as_part({name: _shapes(checkpoint, name) for name in extra}, stored, named)
        new = next((name for name in own if name not in stored), None)
        if new is not None and not self.shares_part:
            self.notes.depart(f"{checkpoint.path}: its names begin otherwise: {own[new]} is {new}, and so on")
        return own, left

    def _as_part(self, extra: Mapping[str, Shapes], stored: Names, named: str | None = None) -> tuple[Names, list[str]]:
        """Names that the model has with another beginning, beside those that are `stored`; and those left over.

        `named` is the class of what they are of, where that is known and no more.
        """
        state, modules = self.model.state_dict(), dict(self.model.named_modules())
        found = place(
            list(extra),
            state,
            lambda name, own: tuple(state[own].shape) in extra[name],
            lambda module: type(modules.get(module)).__name__ == named,
        )
        if found is None:
            return stored, list(extra)
        taken, put = found
        moved = {put + name.removeprefix(taken): name for name in extra if name.startswith(taken)}
        moved = {own: name for own, name in moved.items() if own in state and own not in stored}
        return {**stored, **moved}, [name for name in extra if name not in moved.values()]

    def beyond(self, expert: ExpertReader) -> set[str]:
        """Tensors that an expert's class does not have, since it is a part of the model; none of an unknown class."""
        named = meta.named_class(architecture_of(expert.checkpoint.config))
        if named is None:
            return set()
        with error_context(expert.path / expert.checkpoint.CONFIG, "transformers cannot build this model"):
            own = classes.outline(named, classes.config_of(expert.checkpoint), expert.checkpoint).state_dict()
        stored, extra = meta.rename(self.model, own)
        return set(self.names) - self._as_part({name: [tuple(own[name].shape)] for name in extra}, stored)[0].keys()

    def _find_initial_values(self) -> None:
        lacking = [expert.stored for expert in self.experts.values() if expert.adapter is None]
        unstored = {name for name in self.model.state_dict() if any(name not in stored for stored in lacking)}
        computed = {name for name in {*unstored, *self.absent} if classes.is_expected_missing(self.model, name)}
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
                    self.base.stand_ins[name] = partial(rows_of, value)
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
        read, taken = set(own.values()), {own[name] for name in self.names if name in own}
        written = dict[str, str]()
        for name in self.names:
            stored = own.get(name, self.base.stored.get(name, name))
            # What is read although no class has it under that name is written under its own.
            written[name] = name if stored not in read or (name not in own and stored in taken) else stored
            taken.add(written[name])
        return written

    def write_matrices(self, layers: Collection[str]) -> None:
        """Let what is written hold a matrix for each layer of an expert, where the base's file fuses some of `layers`.

        They are named as transformers saves such a model, or after the tensor that the base's file fuses them in, where
        that name is read as theirs, or as the model calls them.
        """
        fused = {name: piece for name, stored in self.written.items() if (piece := piece_of(stored)) is not None}
        if not any(f"{layer}.weight" in fused for layer in layers):
            return
        known = meta.matrices_on_disk(self.model)
        ends = {name: ".".join(name.split(".")[-3:]) for name in fused}  # such as 3.up_proj.weight
        after = {name: f"{piece.tensor.rpartition('.')[0]}.{ends[name]}" for name, piece in fused.items()}
        read = meta.rename(self.model, after.values())[0]
        for name in fused:
            self.written[name] = known.get(name, after[name] if read.get(name) == after[name] else name)

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
        if self._first_only:
            keep_first_blocks(model)
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


def _shapes(checkpoint: Checkpoint, name: str) -> Shapes:
    """The shapes that a tensor of a model may have, by what a checkpoint or an adapter holds for it."""
    if not isinstance(checkpoint, Adapter):
        return [checkpoint.shape(name)]
    found = [checkpoint.shape(name)] if checkpoint.replaces(name) else []
    changed = [checkpoint.change_shape(name)] if checkpoint.changes(name) else []
    return [*found, *changed, *(shape[::-1] for shape in changed)]


def _mean(name: str, experts: Sequence[ExpertReader], rows: slice | None) -> Tensor:
    """The mean of what experts have of their own, in float32."""
    total = sum(expert.own(name, rows).float() for expert in experts)
    assert isinstance(total, Tensor)
    return total / len(experts)
