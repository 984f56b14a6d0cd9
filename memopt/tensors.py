"""What passes ask of a tensor: whether it is an ordinary one, which memory it has, how often that was written to."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Types of tensors without a behaviour of their own."""


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common; 0 for those that have none."""
    try:
        storage: int = tensor.untyped_storage()._cdata
        return storage
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped by functorch
        return 0


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version
