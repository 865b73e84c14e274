"""A pretended accelerator: tensors that compute on the processor, and say that they are on another device.

It takes the place of the device that tests do not have. What would stop a run there stops it here: an operation on
tensors of both devices, one that makes its result on the wrong one, and `numpy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# A device that PyTorch has a name for, and knows nothing about without one of its modules.
DEVICE = torch.device("lazy:0")
ATEN = torch.ops.aten
# What an accelerator does with tensors of both devices: copies, and look-ups by indices of the processor.
MIXES = (ATEN.copy_, ATEN._to_copy, ATEN.index)


class AcceleratorTensor(torch.Tensor):
    """A tensor that says it is on the accelerator; `inner` is its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> AcceleratorTensor:
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **form)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def new_tensor(self, data: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype).to(DEVICE)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.inner!r}"


@contextmanager
def pretended_accelerator() -> Iterator[str]:
    """For the length of a `with` block `lazy` is a device, whose tensors are `AcceleratorTensor`s; yields its name."""
    made = torch.tensor

    def tensor(*data: Any, device: Any = None, **settings: Any) -> Tensor:
        return made(*data, **settings) if device is None else made(*data, device="cpu", **settings).to(device)

    # Views of such tensors cannot be made in inference mode, nor `torch.tensor` be asked for one.
    with patch.multiple(torch, inference_mode=torch.no_grad, tensor=tensor), _Mode():
        yield DEVICE.type


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do one operation on the device where it belongs.

    Raises:
        RuntimeError: its tensors are on several devices.
    """
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, AcceleratorTensor)]
    asked = kwargs.get("device")
    if func is ATEN._fused_sdp_choice.default and ours:
        return 0  # the form that is made of plain operations
    others = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim]
    onto = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if not ours and not onto:
        return func(*args, **kwargs)
    if ours and others and not (func.overloadpacket in MIXES and isinstance(args[0], AcceleratorTensor)):
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the processor")
    outer = {id(tensor.inner): tensor for tensor in ours}
    args, kwargs = tree_map(
        lambda value: value.inner if isinstance(value, AcceleratorTensor) else value, (args, kwargs)
    )
    if onto and asked is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if not onto:
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, AcceleratorTensor):
            return value
        return outer[id(value)] if id(value) in outer else AcceleratorTensor(value)

    return tree_map(wrap, result)
