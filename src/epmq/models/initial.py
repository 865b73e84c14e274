"""What a class initialises the tensors with that a checkpoint does not store, such as sinusoidal positions."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from epmq.models.meta import set_tensor


def initial_values(model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Values that `from_pretrained` gives to tensors which no file has, where it computes them: name → tensor.

    Those that it draws at random are left out, and with them all others of the same module: the bias of a projection
    that nobody has trained says nothing. It is found by initialising twice. The global random state is left alone.

    Args:
        model: on the meta device.
        names: of its tensors that are not in a file.
    """
    names = set(names)
    if not names:
        return {}
    with torch.random.fork_rng(devices=[]):
        first, second = (_initialised(model, names, seed) for seed in (0, 1))
    drawn = {name.rpartition(".")[0] for name in names if not torch.equal(first[name], second[name])}
    return {name: tensor for name, tensor in first.items() if name.rpartition(".")[0] not in drawn}


def _initialised(model: Any, names: set[str], seed: int) -> dict[str, Tensor]:
    """The named tensors as the class initialises them; what it leaves as it was is another number for every seed."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name in names:
            set_tensor(model, name, torch.full(tensor.shape, 3 + 4 * seed, dtype=tensor.dtype))
    inside = {".".join(name.split(".")[:depth]) for name in names for depth in range(len(name.split(".")))}
    for path, module in model.named_modules():
        module._is_hf_initialized = path not in inside
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                tensor._is_hf_initialized = f"{path}.{leaf}".lstrip(".") not in names
    model.initialize_weights()
    state = model.state_dict()
    return {name: state[name].detach() for name in names}


def fill_absent(model: Any, names: Iterable[str], values: dict[str, Tensor], device: torch.device) -> None:
    """Give real tensors to those that no file has: their initial values, and zeros where there are none."""
    names = set(names)
    for name, tensor in model.state_dict().items():
        if name in names:
            value = values.get(name)
            if value is None or value.shape != tensor.shape:  # more tokens than the files have
                value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            set_tensor(model, name, value.to(device))
