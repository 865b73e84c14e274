"""The linear layers after the last block, such as an output layer, a pooler or a projection: the last step of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from epmq.calibration.calls import StubModel, forms, nan_weights
from epmq.calibration.masks import real_tokens
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import guiding_head
from epmq.models.multitask import MultiTaskModel
from epmq.notes import Notes

if TYPE_CHECKING:
    from epmq.calibration.sequential import SequentialCalibrator


class OutsideStep:
    """The layers after the last block, as a step of all batches: trying it on a batch runs the model's own forward.

    It has the interface of `BlockStep`, with the whole model as the block. Blocks give at once what they gave before.
    """

    lockstep = False
    name = ""

    def __init__(self, calibrator: "SequentialCalibrator", layers: Sequence[str]) -> None:
        self._calibrator, self.block, self.layers = calibrator, calibrator.model, list(layers)
        self.batches = calibrator.batches
        self.members = list(enumerate(calibrator.batches))
        self.missed: Counter[str] = Counter()
        self.position = 0

    @property
    def finished(self) -> bool:
        """Nothing waits."""
        return True

    def run(self, position: int) -> None:
        """Run the model on a batch, up to its output layer."""
        self.position = position
        self._calibrator.run_outside(position)

    leave = run

    def release(self, layer: str) -> None:
        """Nothing waits."""

    def finish(self) -> None:
        """Nothing waits."""

    def offload(self, position: int) -> None:
        """Nothing waits."""

    def padding_mask(self, inputs: Tensor) -> Tensor | None:
        """Which of a layer's inputs are real tokens, in the batch that runs; None if all are."""
        return real_tokens(self.batches[self.position].inputs, inputs.shape[:-1])


@torch.no_grad()
def unread_modules(
    experts: ExpertSet,
    calibration: Mapping[str, Sequence[dict[str, Any]]],
    late: Sequence[str],
    stub: StubModel | None = None,
) -> list[str]:
    """Those of the modules after the last block that no task's head reads; none where a task has no head.

    A module whose weights are not a number leaves a trace in whatever reads it. `calibration` holds each task's inputs,
    batch by batch; `stub` is the model without weights, where it is there already.
    """
    if not late or not all(expert.has_head for expert in experts.experts.values()):
        return []
    stub = stub or StubModel(experts)
    heads = {task: guiding_head(expert, Notes(), stub.model) for task, expert in experts.experts.items()}
    if any(head is None for head in heads.values()):
        return []
    model = MultiTaskModel(stub.model, {task: head for task, head in heads.items() if head is not None})
    inputs = [(task, one) for task, batches in calibration.items() for one in forms(batches)]
    try:
        plain = [model(task, **one).isnan() for task, one in inputs]
        if any(bool(scores.any()) for scores in plain):
            return []
        return [name for name in late if not _leaves_trace(model, stub.model.get_submodule(name), inputs)]
    except Exception:  # a head that cannot be run without weights may read anything
        return []


def _leaves_trace(model: MultiTaskModel, module: nn.Module, inputs: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Whether scores are no number any more when a module's weights are none."""
    with nan_weights(module):
        return any(bool(model(task, **one).isnan().any()) for task, one in inputs)
