"""What the calibration of every block needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from epmq.calibration.offload import Offloader
from epmq.calibration.teacher import Teacher
from epmq.merging.experts import ExpertSet, TensorReader
from epmq.method_settings import Guidance, Quantize


@dataclass
class CalibrationContext:
    """Readers, settings and teachers of one run.

    Attributes:
        experts: base and experts; tensors outside the blocks of `experts.model` must be real.
        merged: the merged model.
        settings: of the quantizer.
        task_weights: task → ω, which sum to 1.
        device: where blocks and moments live.
        offloader: takes calibration activations while they wait.
        teachers: task → the expert beside the merged model; empty where no expert runs.
    """

    experts: ExpertSet
    merged: TensorReader
    settings: Quantize
    task_weights: dict[str, float]
    device: torch.device
    offloader: Offloader = field(default_factory=Offloader)
    teachers: dict[str, Teacher] = field(default_factory=dict)

    @property
    def guidance(self) -> Guidance:
        return self.settings.guidance()
