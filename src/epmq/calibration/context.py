"""What the calibration of every block needs to know."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from epmq.calibration.calls import BlockCalls
from epmq.calibration.offload import Offloader
from epmq.calibration.teacher import Teacher
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import TensorReader
from epmq.models.storage import Layout
from epmq.quantize_settings import Guidance, Quantize


@dataclass
class CalibrationContext:
    """Readers, settings and teachers of one run."""

    experts: ExpertSet
    merged: TensorReader
    settings: Quantize
    guidance: Guidance  # what is made of the experts
    layout: Layout
    task_weights: dict[str, float]  # ω, which sum to 1
    device: torch.device  # where blocks and moments live
    offloader: Offloader = field(default_factory=Offloader)  # takes calibration activations while they wait
    calls: BlockCalls = field(default_factory=BlockCalls)  # as `try_forwards` found them
    teachers: dict[str, Teacher] = field(default_factory=dict)  # by task; empty where no expert runs

    def tensor(self, name: str) -> Tensor:
        """A merged tensor; one that is not quantized in the dtype in which it is stored."""
        return self.layout.cast(name, self.merged.tensor(name))

    def features(self, layers: list[str]) -> float:
        """α, the share of the experts' own inputs in the targets; an output layer's are the experts' scores."""
        guidance = self.guidance
        own = guidance.own_inputs or (guidance.runs_experts and layers == [self.layout.output_layer])
        return 1.0 if own else guidance.features
