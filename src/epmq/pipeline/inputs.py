"""Examples as inputs that the model takes: cut to its positions, by its names, and tried on it before any compute."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epmq.data.encoding import WINDOW, encode, split_first
from epmq.data.examples import Examples
from epmq.data.processors import fit_to_model, tokenizer_of
from epmq.data.same_processor import encodes_alike
from epmq.errors import InputError
from epmq.merging.experts import ExpertSet
from epmq.models.meta import vocabulary
from epmq.models.probe import TEXT, InputProbe
from epmq.recipe import Recipe

Batches = list[dict[str, Any]]
Convert = Callable[[dict[str, Any]], dict[str, Any]]
# Examples that are scored in windows, of which no token is lost.
IN_WINDOWS = ("question", "words")
# Inputs that are made of texts and pictures in files.
FILES_GIVE = ("input_ids", "pixel_values")
# How much like an input's name another must be to be a slip of the pen.
ALIKE = 0.85
READY = "pass ready batches of it from Python"
# What of a batch is as long as a text, or a target.
LONG = {False: ("input_ids",), True: ("labels", "decoder_input_ids")}


class ModelInputs:
    """Makes model inputs of examples, for all experts of a run.

    Args:
        processor: the base's; from now on it gives nothing that the model has no name for.
        written: the same, opened from the files that the output will have, where there is to be one.
    """

    def __init__(self, experts: ExpertSet, recipe: Recipe, processor: Any, written: Any = None) -> None:
        self._experts, self._recipe, self.processor, self._written = experts, recipe, processor, written
        self._name = type(experts.model).__name__
        self._probe = InputProbe(experts.model)
        self._taken, self._limits = {False: 0, True: 0}, dict[bool, int | None]({False: None, True: None})
        for one in (processor, written):
            fit_to_model(one, experts.model.forward)

    def check_files(self) -> None:
        """Check that the model takes what can be made of files: texts and pictures."""
        main = self._experts.model.main_input_name
        if main not in FILES_GIVE:
            raise InputError(f"{self._name} takes {main}, which files do not give: {READY}")

    def window(self, where: str) -> int | None:
        """Tokens of a language model's windows: those of the recipe, else as many as tokenizer and model allow.

        Raises:
            InputError: the recipe asks for more tokens than the model has positions for.
        """
        tokenizer, asked = tokenizer_of(self.processor), self._recipe.max_length
        if tokenizer is None:
            return asked
        wanted = asked or min(tokenizer.model_max_length, WINDOW)
        limit = self._limit(wanted, {}, target=False)
        if limit is None or limit >= wanted:
            return asked
        self._refuse_asked(limit)
        self._experts.notes.append(f"{where}: windows of {limit} tokens, for which {self._name} has positions")
        return limit

    def encode(
        self, examples: Examples, where: str, scored: bool = False, model_takes: Convert = lambda batch: batch
    ) -> tuple[Examples, Batches]:
        """Inputs of the model, batch by batch, and the examples with what they are cut to.

        Args:
            where: the field that they come from, for notes.
            scored: they are to be scored: none may be left out, and targets are generated.
            model_takes: makes inputs of the shared model of those of a task's class.

        Raises:
            InputError: the model does not take them, or one has no tokens.
        """
        batches = self._known([model_takes(batch) for batch in self._encoded(examples)], where)
        for batch in batches:
            self._check_tokens(batch)
        kept = self._without_empty(examples, batches, where, scored)
        if len(kept) < len(examples):
            examples, batches = kept, [model_takes(batch) for batch in self._encoded(kept)]
        text, answer = (self._positions(examples, batches, target, scored) for target in (False, True))
        if text or answer:
            if not (scored and examples.kind in IN_WINDOWS):
                self._note_cut(batches, where, text, target=False)
            self._note_cut(batches, where, answer, target=True)
            examples = replace(examples, longest=(text, answer))
            batches = self._known([model_takes(batch) for batch in self._encoded(examples)], where)
        if scored:  # calibration inputs are tried block by block (`epmq.calibration.calls`)
            self._try(batches)
        return examples, batches

    def _encoded(self, examples: Examples) -> Batches:
        length, ready = self._recipe.max_length, examples.kind in ("batches", "tokens")
        if not (ready or self._written is None or encodes_alike(self.processor, self._written, examples, length)):
            raise InputError(
                f"{self._experts.base.path}: the processor gives other inputs when it is opened from the files that go "
                "into the output"
            )
        return list(encode(examples, self.processor, self._recipe.batch_size, length))

    def _known(self, batches: Batches, where: str) -> Batches:
        """The batches without what no part of the model has a name for; what the model is there for must be in them."""
        model = self._experts.model
        own, main = inspect.signature(model.forward).parameters, model.main_input_name
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        parts = {type(part) for part in model.modules()} if is_open else {type(model)}  # it hands on what it is given
        names = {name for part in parts for name in inspect.signature(part.forward).parameters}
        unknown = {str(name): None for batch in batches for name in batch if name not in names}
        for name in unknown:
            meant = get_close_matches(name, own, 1, ALIKE)
            if meant:
                raise InputError(f"{self._name} takes no {name}; is {meant[0]} meant?")
        if unknown:
            self._experts.notes.append(f"{where}: {self._name} takes no {', '.join(unknown)}; left out")
            batches = [{name: value for name, value in batch.items() if name in names} for batch in batches]
        for batch in batches:
            given = main in batch or any(name.endswith(("inputs_embeds", "encoder_outputs")) for name in batch)
            if main in own and not given:
                hint = f": {READY}" if main not in FILES_GIVE else ""
                raise InputError(f"{self._name} takes {main}, which these examples do not give{hint}")
        return batches

    def _check_tokens(self, batch: dict[str, Any]) -> None:
        """Check that a batch has tokens, and the model an embedding for each."""
        rows = vocabulary(self._experts.model)
        for name in ("input_ids", "decoder_input_ids", "labels"):
            ids = batch.get(name)
            if not isinstance(ids, Tensor):
                continue
            if name == "input_ids" and not ids.numel():
                raise InputError("a batch of examples has no tokens at all")
            if rows is not None and ids.numel() and int(ids.max()) >= rows:
                raise InputError(
                    f"token {int(ids.max())} in {name}, but {self._experts.base.path} has {rows} embeddings: the "
                    "tokenizer is another model's"
                )

    def _without_empty(self, examples: Examples, batches: Batches, where: str, scored: bool) -> Examples:
        """Leave out texts without any token, which no model was made for; those to be scored may have none."""
        masks = [batch.get("attention_mask") for batch in batches]
        alone = examples.kind not in ("batches", "tokens", "image", "choices")  # a row of a mask is an example
        if not alone or not all(isinstance(mask, Tensor) for mask in masks):
            return examples
        counts = np.concatenate([mask.sum(1).numpy() for mask in masks if mask is not None])
        empty = np.flatnonzero(counts == 0)
        if not len(empty) or len(empty) == len(counts):
            return examples
        if scored and examples.kind in ("causal", "chat"):  # they add nothing to a perplexity
            return examples
        if scored:
            raise InputError(f"example {empty[0] + 1} has no tokens: take it out")
        self._experts.notes.append(f"{where}: {len(empty)} of {len(counts)} texts have no tokens and are left out")
        return examples.take(np.flatnonzero(counts))

    def _positions(self, examples: Examples, batches: Batches, target: bool, scored: bool) -> int | None:
        """How many tokens the texts, or targets, of examples are to be cut to; None where all fit."""
        sizes = {_length(batch, target): batch for batch in batches}
        count = max(sizes, default=0)
        wanted = count + (target and scored and count > 0)  # a generated text ends with one token more
        limit = self._limit(wanted, sizes.get(count, {}), target)
        if limit is None or wanted <= limit:
            return None
        if examples.kind in ("batches", "tokens"):
            if count > limit:
                raise InputError(f"inputs of {count} tokens, but {self._name} has positions for {limit}")
            return None
        if count > limit:
            self._refuse_asked(limit)
        return limit

    def _limit(self, wanted: int, batch: dict[str, Any], target: bool) -> int | None:
        """The largest number of tokens, if it is known to be below what was ever wanted."""
        if self._limits[target] is None and wanted > self._taken[target]:
            self._limits[target] = self._probe.positions(wanted, batch, target)
            self._taken[target] = wanted
        return self._limits[target]

    def _refuse_asked(self, limit: int) -> None:
        asked = self._recipe.max_length
        if asked is not None and asked > limit:
            raise InputError(f"max_length is {asked}, but {self._name} has positions for {limit} tokens")

    def _note_cut(self, batches: Batches, where: str, limit: int | None, target: bool) -> None:
        lengths = torch.cat([_lengths(batch, target) for batch in batches])
        cut = 0 if limit is None else int((lengths > limit).sum())
        if cut:
            what = "targets" if target else "texts"
            note = f"{cut} of {len(lengths)} {what} are cut to the {limit} tokens that {self._name} has positions for"
            self._experts.notes.append(f"{where}: {note}")

    def _try(self, batches: Batches) -> None:
        """Let the model's code run on a few examples of the longest batch, without weights."""
        if not batches:
            return
        batch = split_first([max(batches, key=lambda one: _length(one, target=False))], 2)[0]
        plain = all(name in TEXT or name.startswith("decoder_") for name in batch)
        # A vision tower may have to give more than what its last block does.
        probe = self._probe if plain else self._probe.of_all_blocks
        fault = probe.fault(batch)
        # Where not even a short text is taken, it is the zeros that the code cannot live with.
        if fault is not None and ("input_ids" not in batch or probe.takes_texts(batch)):
            raise InputError(f"{self._name} cannot take these inputs ({fault})")


def _length(batch: dict[str, Any], target: bool) -> int:
    tensors = [batch[name] for name in LONG[target] if isinstance(batch.get(name), Tensor) and batch[name].ndim == 2]
    return max((tensor.shape[1] for tensor in tensors), default=0)


def _lengths(batch: dict[str, Any], target: bool) -> Tensor:
    """Tokens of each text, or target, of a batch that was made of examples."""
    if target:
        return (batch["labels"] != -100).sum(1) if "labels" in batch else torch.zeros(0, dtype=torch.long)
    ids = batch["input_ids"]
    mask: Tensor = batch.get("attention_mask", torch.ones_like(ids))  # a model that takes none reads padding as well
    return mask.sum(1)
