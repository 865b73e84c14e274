"""Looking into checkpoints."""

import io
from functools import partial
from pathlib import Path

import torch
from conftest import recipe_for
from rich.console import Console
from safetensors.torch import save_file

from epmq.files import write_json
from epmq.pipeline.run import run
from epmq.reporting.inspection import BLOCKS, OUTSIDE, PARTS, REST, TABLES, contents, inspection_tables


def test_sizes_are_those_of_the_dtypes(tmp_path):
    dtypes = [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.uint16]
    tensors = {str(dtype): torch.zeros(3, 4, dtype=dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "bert", "architectures": ["BertModel"]})
    sizes = {name: size for name, (_, _, size) in contents(tmp_path)["tensors"].items()}
    assert sizes == {name: tensor.nbytes for name, tensor in tensors.items()}


def test_all_that_is_known_of_a_checkpoint_is_shown(pool, tmp_path):
    report = run(recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "gptq"}), progress=False)
    console = Console(file=io.StringIO(), width=160)
    for table in inspection_tables(tmp_path / "out", layers=True):
        console.print(table)
    text = console.file.getvalue()
    groups = (
        "4 bits, symmetric, group size a row, pack-quantized",
        "8 bits, symmetric, group size a row, int-quantized",
    )
    for title in ("BertModel", *groups, "sizes", "mean accuracy", "deviation by depth", "quantized layers", *PARTS):
        assert title in text
    assert all(layer["name"] in text for layer in report["layers"])
    found = contents(tmp_path / "out")
    assert all(found[field] == report[field] for field in ("parameters", "bytes", "bits_per_weight"))
    assert found["parameters"] == contents(pool / "base")["parameters"]
    stored = {(weight.part, weight.stored) for weight in found["weights"]}
    assert stored == {
        (BLOCKS, "4 bits, a row"),
        (TABLES, "8 bits, a row"),
        (TABLES, "F16"),  # there are as many positions as tokens, and a file does not say which is which
        (OUTSIDE, "4 bits, a row"),
        (REST, "F16"),
    }


def checkpoint(folder: Path, quantization: dict, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "bert", "vocab_size": 96, "quantization_config": quantization}
    write_json(folder / "config.json", config)
    return folder


def test_checkpoints_of_others_are_counted(tmp_path):
    words, half = partial(torch.zeros, dtype=torch.int32), partial(torch.zeros, dtype=torch.float16)
    gptq = {
        "a.0.qweight": words(8, 32),  # 64 inputs of 4 bits
        "a.0.scales": half(2, 32),
        "a.0.qzeros": words(2, 4),
        "a.0.g_idx": words(64),
        "norm.weight_g": half(1, 7),
    }
    [weight, norm] = contents(
        checkpoint(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32}, **gptq)
    )["weights"]
    assert (weight.name, weight.stored, weight.part, weight.parameters) == ("a.0.weight", "4 bits, g32", BLOCKS, 2048)
    assert (norm.name, norm.stored, norm.parameters) == ("norm.weight_g", "F16", 7)
    awq = {"a.0.qweight": words(64, 4), "a.0.scales": half(2, 32), "a.0.qzeros": words(2, 4)}
    found = contents(checkpoint(tmp_path / "awq", {"quant_method": "awq", "bits": 4, "group_size": 32}, **awq))
    assert found["parameters"] == 2048 and found["bits_per_weight"] == 8 * (1024 + 128 + 32) / 2048
    tied = {
        "words.weight": torch.zeros(96, 64, dtype=torch.int8),
        "words.weight_scale": half(96, 2),
        "words.weight_zero_point": torch.zeros(96, 2, dtype=torch.int8),
        "head.weight_scale": half(96, 2),
    }
    found = contents(checkpoint(tmp_path / "tied", {"quant_method": "compressed-tensors"}, **tied))
    assert found["parameters"] == 96 * 64 and {weight.part for weight in found["weights"]} == {TABLES}
    assert {weight.stored for weight in found["weights"]} == {"8 bits, g32, asymmetric", "scales for what is tied"}
    other = {"a.0.weight": torch.zeros(64, 1, dtype=torch.uint8), "a.0.weight.absmax": torch.zeros(2)}
    path = checkpoint(tmp_path / "bnb", {"quant_method": "bitsandbytes"}, **other)
    assert contents(path)["parameters"] is None and contents(path)["bits_per_weight"] is None
    console = Console(file=io.StringIO(), width=160)
    for folder in ("gptq", "awq", "tied", "bnb"):
        for table in inspection_tables(tmp_path / folder, layers=True):
            console.print(table)
    assert "scales for what is tied" in console.file.getvalue() and "unknown" in console.file.getvalue()
