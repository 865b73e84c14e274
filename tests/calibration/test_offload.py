import os
import sys

import pytest
import torch
from conftest import recipe_for
from safetensors.torch import load_file

from epmq.calibration.offload import SMALLEST, Offloader
from epmq.pipeline.run import run


def resident(tensor: torch.Tensor) -> int:
    """Bytes of a mapped tensor that are in this process's memory (Linux)."""
    start, size = f"{tensor.untyped_storage().data_ptr():x}-", 0
    with open("/proc/self/smaps") as file:
        lines = iter(file)
        for line in lines:
            if line.startswith(start):
                size = next(int(row.split()[1]) << 10 for row in lines if row.startswith("Rss:"))
    return size


def test_an_offloaded_tensor_is_the_same_wherever_it_is_referred_to(tmp_path):
    tensor = torch.randn(3, SMALLEST // 4)
    other, copy = tensor, tensor.clone()
    Offloader(tmp_path).put([tensor, None, "text", tensor])
    assert other.untyped_storage().filename is not None and torch.equal(other, copy)
    assert os.listdir(tmp_path) == []
    tensor.mul_(2)
    Offloader(tmp_path).put([tensor])
    assert torch.equal(other, 2 * copy)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_offloaded_leaves_memory_until_it_is_read(tmp_path):
    tensor = torch.randn(1 << 20)
    Offloader(tmp_path).put([tensor])
    assert resident(tensor) == 0
    tensor.sum()
    assert resident(tensor) >= 1 << 22


def test_small_tensors_and_no_folder_change_nothing(tmp_path):
    small, large = torch.randn(4), torch.randn(SMALLEST)
    Offloader(tmp_path).put([small])
    Offloader().put([large])
    assert small.untyped_storage().filename is None and large.untyped_storage().filename is None


def test_views_and_strides_are_kept(tmp_path):
    whole = torch.randn(SMALLEST, 4)
    part, copy = whole.T[1:3], whole.T[1:3].clone()
    Offloader(tmp_path).put([part])
    assert torch.equal(part, copy)


@pytest.mark.parametrize("method", ["gptq", "expert_guided"])
def test_a_run_with_activations_on_disk_gives_the_same_files(pool, tmp_path, monkeypatch, method):
    monkeypatch.setattr("epmq.calibration.offload.SMALLEST", 0)
    offloaded, original = [], Offloader._put
    monkeypatch.setattr(
        Offloader, "_put", lambda self, tensor: offloaded.append(tensor.shape) or original(self, tensor)
    )
    for activations in ("memory", "disk"):
        recipe = recipe_for(
            pool, quantize={"method": method}, activations=activations, output=str(tmp_path / activations)
        )
        run(recipe, progress=False, evaluate=False)
        assert bool(offloaded) == (activations == "disk")
    files = sorted(path.relative_to(tmp_path / "disk") for path in (tmp_path / "disk").rglob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    assert load_file(tmp_path / "disk" / files[0])


def test_activations_on_disk_are_refused_on_an_accelerator(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("epmq.pipeline.prepare.select_device", lambda name: torch.device("cuda"))
    recipe = recipe_for(pool, activations="disk", output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="activations: disk works on a CPU only"):
        run(recipe, progress=False)
