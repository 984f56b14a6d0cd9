"""How much work an operation is: floating-point operations, and bytes read and written.

With what a machine does in a second (`memopt.hardware`) that makes an estimate of its time, the larger of the two
(Williams et al., "Roofline", 2009). FLOPs are those of torch.utils.flop_counter: matrix products, convolutions and
attention, whose other work is small. Views cost nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FREE = frozenset(
    [
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "lift_fresh",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "set_",
        "resize_",
        "_unsafe_view",
        "_reshape_alias",
    ]
)
"""Operations that neither read nor write values."""


_ALIKE = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_efficient_attention_backward",
}
"""What the counter of FLOPs does not know, and what takes its tensors in the same order."""


class Cost(NamedTuple):
    """The work of an operation."""

    flops: int = 0
    """In matrix products, convolutions and attention."""
    narrow: int = 0
    """Those of them in floating-point types of 2 bytes or fewer."""
    bytes: int = 0
    """Read and written."""
    calls: int = 0
    """1 if it does anything."""


@functools.cache
def _kind(func: Any) -> tuple[bool, Any]:
    """Whether an operation is work, and what counts its FLOPs."""
    from torch.utils.flop_counter import flop_registry

    name = func._schema.name.partition("::")[2]
    free = getattr(func, "is_view", False) or name in _FREE
    known = getattr(torch.ops.aten, _ALIKE[name]) if name in _ALIKE else func._overloadpacket
    return not free, flop_registry.get(known)


def cost_of(func: Any, args: Any, kwargs: Any, result: Any) -> Cost:
    """The work of one operation from its arguments and results, which may be fake tensors."""
    works, count = _kind(func)
    if not works:
        return Cost()
    moved = sum(_nbytes(value) for value in (*args, *kwargs.values())) + _nbytes(result)
    flops = 0
    if count is not None:
        try:
            flops = int(count(*args, **kwargs, out_val=result))
        except (AssertionError, TypeError, ValueError, IndexError, AttributeError):  # a form that it does not know
            flops = 0
    narrow = flops if flops and _width(result) <= 2 else 0
    return Cost(flops, narrow, moved, 1)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            return 0
        # What an expanded tensor repeats is read once.
        repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
        return value.untyped_storage().nbytes() if repeats else value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_nbytes(item) for item in value)
    return 0


def _width(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.element_size()
    if isinstance(value, (list, tuple)):
        return next((_width(item) for item in value if isinstance(item, Tensor)), 8)
    return 8
