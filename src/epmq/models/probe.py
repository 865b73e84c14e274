"""Ask a model without weights which inputs it takes, before any compute: its own code runs, on zeros.

The first block of each stack is run, and linear layers give zeros at once, so that a forward costs next to nothing.
What depends on shapes and on the numbers of tokens and positions is as it is in the model itself.
"""

import copy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from epmq.errors import reason
from epmq.models.blocks import find_stacks, linears
from epmq.models.hooks import stops_before, without_cache
from epmq.models.meta import set_tensor, vocabulary

# Tokens of a text that every model takes.
SHORT = 2
# Inputs that are made anew for another number of tokens; all others stay.
TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


class InputProbe:
    """Tells which inputs a model takes.

    Args:
        model: the model on the meta device; it stays as it is.
        whole: all blocks are run, where later parts of the model may ask for what each of them gives.
    """

    def __init__(self, model: Any, whole: bool = False) -> None:
        self._source, self._whole = model, whole

    @cached_property
    def model(self) -> Any:
        """A copy of the model with zeros in the place of its weights, all of them in one place in memory."""
        model = copy.deepcopy(self._source)
        for stack in [] if self._whole else find_stacks(model):
            del model.get_submodule(stack.name)[1:]
        for name, tensor in model.state_dict().items():
            set_tensor(model, name, torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
        for _, layer in linears(model):
            features = layer.get_parameter("weight").shape[0 if isinstance(layer, nn.Linear) else 1]
            layer.forward = partial(_zeros, features)
        return model

    @cached_property
    def of_all_blocks(self) -> "InputProbe":
        """The same of all blocks."""
        return InputProbe(self._source, whole=True)

    @torch.no_grad()
    def fault(self, inputs: dict[str, Any]) -> str | None:
        """Why the model cannot take inputs, as its code says it; None if it can."""
        try:
            with without_cache(self.model):
                stops_before(self.model, self.model.get_output_embeddings(), inputs)
        except Exception as error:  # whatever a model's code raises
            # Zeros that share their place in memory are what some products of many matrices do not take.
            return None if "stride" in str(error) else reason(error)
        return None

    def positions(self, wanted: int, batch: dict[str, Any] | None = None, target: bool = False) -> int | None:
        """How many tokens a text, or a target, may have; None where `wanted` are not too many, or it cannot be told.

        Args:
            batch: inputs of the model; what it wants beside the text, such as pixels, is taken from there.
        """
        try:
            makers = [partial(self._inputs, others, target) for others in self._others(batch)]
        except Exception:  # a model that cannot even be built this way
            return None
        make = next((make for make in makers if self.fault(make(SHORT)) is None), None)
        if make is None and not self._whole:
            return self.of_all_blocks.positions(wanted, batch, target)
        if make is None or self.fault(make(wanted)) is None:
            return None
        low, high = SHORT, wanted  # the first is taken, the second is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fault(make(middle)) is None else (low, middle)
        return low

    def takes_texts(self, batch: dict[str, Any]) -> bool:
        """Whether a short text in the place of a batch's is taken: if so, a fault is that of the batch."""
        others = self._others(batch)
        return any(self.fault(self._inputs(other, False, SHORT)) is None for other in others)

    def _others(self, batch: dict[str, Any] | None) -> list[dict[str, Any]]:
        """What may have to go in beside a text: nothing, or what a batch has of the first example."""
        rest = {name: value[:1] for name, value in (batch or {}).items() if _is_other(name, value)}
        return [{}, rest] if rest else [{}]

    def _inputs(self, others: dict[str, Any], target: bool, length: int) -> dict[str, Any]:
        config, rows = self.model.config, vocabulary(self.model)
        special = {value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
        word = next(number for number in range(rows or SHORT) if number not in special)
        lengths = (SHORT, length) if target else (length, SHORT)
        text, answer = (torch.full((1, count), word) for count in lengths)
        inputs = {**others, "input_ids": text, "attention_mask": torch.ones_like(text)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = answer
        return inputs


def _is_other(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and name not in TEXT and not name.startswith("decoder_")


def _zeros(features: int, inputs: Tensor) -> Tensor:
    return inputs.new_zeros(*inputs.shape[:-1], features)
