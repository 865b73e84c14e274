"""What the calibration of every block needs to know."""

from dataclasses import dataclass, field

import torch

from epmq.calibration.calls import BlockCalls
from epmq.calibration.offload import Offloader
from epmq.calibration.teacher import Teacher
from epmq.merging.experts import ExpertSet
from epmq.merging.readers import TensorReader
from epmq.method_settings import Guidance, Quantize


@dataclass
class CalibrationContext:
    """Readers, settings and teachers of one run."""

    experts: ExpertSet
    merged: TensorReader
    settings: Quantize
    task_weights: dict[str, float]  # ω, which sum to 1
    device: torch.device  # where blocks and moments live
    offloader: Offloader = field(default_factory=Offloader)  # takes calibration activations while they wait
    calls: BlockCalls = field(default_factory=BlockCalls)  # as `try_forwards` found them
    teachers: dict[str, Teacher] = field(default_factory=dict)  # by task; empty where no expert runs

    @property
    def guidance(self) -> Guidance:
        return self.settings.guidance()
