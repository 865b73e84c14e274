"""ONNX whose products round their inputs to 8 bits: faster for few tokens, and not exact; see `epmq.export.onnx`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epmq.export import onnx
from epmq.export.onnx_layers import INTEGER
from epmq.export.target import Verified
from epmq.models.codes import CodedCheckpoint

TITLE = "onnxruntime, faster and not exact"
PACKAGES, EXTRA, RUNTIME = onnx.PACKAGES, onnx.EXTRA, onnx.RUNTIME
ENDING = "_int8"
check = onnx.check


def write(source: CodedCheckpoint, folder: Path) -> list[Path]:
    """See `epmq.export.target.Target`."""
    return onnx.write_graphs(source, folder, INTEGER, ENDING)


def verify(folder: Path, source: Path, examples: Sequence[dict[str, Any]]) -> Verified:
    """See `epmq.export.target.Target`: how far outputs are off is said, and refused nowhere."""
    return onnx.verify_graphs(folder, source, examples, ENDING, None)
