"""What passes ask of a tensor: whether it is an ordinary one, which memory it has, how often that was written to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.utils._python_dispatch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Types of tensors without a behaviour of their own."""

unseen = torch._C.DisableTorchFunction
"""A context in which no function mode is told of what is asked of tensors: that costs more than the asking."""


def is_memory(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but a view of plain memory: what can be copied byte by byte, and made again."""
    if type(tensor) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    return tensor.device.type != "meta" and not tensor.is_conj() and not tensor.is_neg() and tensor.numel() > 0


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; 0 for those that have none."""
    try:
        storage: int = tensor.untyped_storage()._cdata
        return storage
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped by functorch
        return 0


def span(tensor: Tensor) -> tuple[int, int]:
    """The elements of its storage between which a tensor lies: the first, and the one after the last."""
    start = int(tensor.storage_offset())
    return start, start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def differs(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor of the same shape lies otherwise in memory."""
    return tensor.shape == like.shape and is_memory(tensor) and tensor.stride() != like.stride()


def laid(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy that lies in memory as strides say."""
    # torch's own conversions leave weights of 1x1 as they are, whose strides then say nothing to kernels.
    made = torch.empty_strided(tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach())


def holders_of(tensor: Tensor) -> int:
    """How many tensors, this one among them, have its memory; for one with a storage."""
    return _uses(tensor) - _uses_of_one() + 1


def _uses(tensor: Tensor) -> int:
    uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return uses


@functools.cache
def _uses_of_one() -> int:
    with torch.utils._python_dispatch._disable_current_modes():
        return _uses(torch.empty(1, device="cpu"))  # versions of torch count the storage's own object or not
