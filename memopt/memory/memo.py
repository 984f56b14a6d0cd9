"""What operations make of fake tensors, remembered: the second block of a model asks what the first has asked.

Fake tensors run each operation's shape function, or look for its result by a key that takes them long to make. Most
operations of a step are of a few kinds, and their results are told by the shapes, strides and types that they were
given: new tensors, a view of an argument, or the argument that was written to. :class:`Memo` knows these after it has
seen one, and leaves everything else to torch: tensors with known values, operations that depend on values or change
shapes, what is not torch's own, results that share memory in other ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

_PLAIN = frozenset(
    [int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, complex]
)
_TOO_MUCH = frozenset([torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view])
Recipe = Callable[[Any], Any]
"""Makes an operation's result of its positional arguments."""


class Memo:
    """Results of operations on fake tensors of one mode."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._known: dict[Any, Recipe | None] = {}
        self._remembers: dict[Any, bool] = {}

    def key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation's result is told by; None where more may have a say."""
        remembers = self._remembers.get(func)
        if remembers is None:
            remembers = self._remembers[func] = func.namespace == "aten" and not _TOO_MUCH.intersection(func.tags)
        if not remembers:
            return None
        found: list[Any] = [func, torch.get_default_dtype()]
        if not self._describe(args, found) or (kwargs and not self._describe(tuple(kwargs.items()), found)):
            return None
        return tuple(found)

    def _describe(self, values: Any, found: list[Any]) -> bool:
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if (
                    value.constant is not None
                    or value.fake_mode is not self.mode
                    or value.layout is not torch.strided
                    or value.is_conj()
                    or value.is_neg()
                    or value._is_zerotensor()
                ):
                    return False
                found += (value.shape, value.stride(), value.dtype, value.fake_device)
            elif kind in _PLAIN:
                found += (kind, value)  # 1, 1.0 and True are equal
            elif kind is list or kind is tuple or kind is torch.Size:
                found += (kind, len(value))
                if not self._describe(value, found):
                    return False
            else:
                return False
        return True

    def run(self, key: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's result; ``key`` is not None."""
        if (recipe := self._known.get(key)) is not None:
            return recipe(args)
        result = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = self._recipe(func, args, kwargs, result)
        return result

    def _recipe(self, func: Any, args: Any, kwargs: Any, result: Any) -> Recipe | None:
        if func._schema.is_mutable:
            if not str(func._schema.name).endswith("_"):  # out= may change its shape
                return None
            if result is None and not func._schema.returns:
                return lambda args: None
            return (lambda args: args[0]) if args and result is args[0] else None
        given = {_storage(tensor)._cdata for tensor in _tensors((args, kwargs))}
        if type(result) is FakeTensor:
            if _simple(result) and _storage(result)._cdata in given:
                return self._view(args[0], result)
            return self._fresh(result, given)
        if type(result) is not tuple:
            return None
        made = [None if part is None else self._fresh(part, given) for part in result]
        if any(one is None and part is not None for one, part in zip(made, result, strict=True)):
            return None
        return lambda args: tuple([one if one is None else one(args) for one in made])

    def _fresh(self, result: Any, given: set[int]) -> Recipe | None:
        """A result with memory of its own, which is none of ``given``, and will be of later ones."""
        if type(result) is not FakeTensor or not _simple(result) or _storage(result)._cdata in given:
            return None
        given.add(_storage(result)._cdata)
        mode, shape, stride = self.mode, tuple(result.shape), result.stride()
        dtype, device = result.dtype, result.fake_device
        last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if result.numel() else 0
        if result.storage_offset() or _storage(result).nbytes() != last * dtype.itemsize:
            return None

        def make(args: Any) -> Tensor:
            with no_dispatch():
                empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            return FakeTensor(mode, empty, device)

        return make

    def _view(self, base: Any, result: Any) -> Recipe | None:
        """A result that is a part of the first argument."""
        if type(base) is not FakeTensor or not _simple(result) or result is base or result.dtype is not base.dtype:
            return None
        if _storage(base)._cdata != _storage(result)._cdata or result.fake_device != base.fake_device:
            return None
        mode, shape, stride = self.mode, tuple(result.shape), result.stride()
        dtype, device, further = result.dtype, result.fake_device, result.storage_offset() - base.storage_offset()

        def make(args: Any) -> Tensor:
            base = args[0]
            storage, offset = base.untyped_storage(), base.storage_offset() + further
            with no_dispatch():
                part = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, stride)
            return FakeTensor(mode, part, device)

        return make


def _simple(tensor: FakeTensor) -> bool:
    return (
        tensor.constant is None
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor() or tensor.requires_grad)
        and all(type(n) is int for n in (*tensor.shape, *tensor.stride()))
    )


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
