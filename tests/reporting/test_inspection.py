"""Looking into checkpoints."""

import io

import torch
from conftest import recipe_for
from rich.console import Console
from safetensors.torch import save_file

from epmq.files import write_json
from epmq.pipeline.run import run
from epmq.reporting.inspection import contents, inspection_tables


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
    for title in ("BertModel", "4 bits, symmetric", "sizes", "mean accuracy", "deviation by depth", "quantized layers"):
        assert title in text
    assert all(layer["name"] in text for layer in report["layers"])
