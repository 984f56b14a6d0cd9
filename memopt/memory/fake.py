"""A model without its data: copies on fake tensors, which know shapes, types and storages, and nothing else.

``copy_of`` deep-copies any objects (a model, its optimizer, its inputs) in one go, so that what they share stays
shared; every tensor becomes a fake one on the CPU, whatever device it was on. Tensors that share a storage share a
fake one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_VIEW = _aten.view.default
_BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
_WEIGHT_OF_NORM = {
    _aten.native_layer_norm.default: 2,
    _aten.native_group_norm.default: 1,
    _aten.native_batch_norm.default: 1,
    _aten._native_batch_norm_legit.default: 1,
    _aten._native_batch_norm_legit.no_stats: 1,
    _aten._batch_norm_with_update.default: 1,
}
"""Norms whose results begin with the output, the mean and its like, with the position of their weight."""
_GROUP_NORM_BACKWARD = _aten.native_group_norm_backward.default
_ITEM = _aten._local_scalar_dense.default


def new_mode() -> FakeTensorMode:
    """A fake mode in which real constants (a table in a closure, say) become fake as they are used."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def mode_of(model: nn.Module) -> FakeTensorMode | None:
    """The fake mode that a model was built in, or None."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return None


class _Copy(TorchFunctionMode):
    """While active, ``copy.deepcopy`` and ``clone`` of a tensor give a fake one."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.alive: list[Any] = []  # so that no address is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            made = memo[id(tensor)] = self.fake(tensor)
            return made
        if func is Tensor.clone:  # as nn.Parameter's __deepcopy__ does with its data
            return self.fake(args[0])
        return func(*args, **(kwargs or {}))

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same shape, strides and type, over the fake twin of its storage."""
        with torch._C.DisableTorchFunctionSubclass():
            made = self._fake(tensor.detach()).requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        return made

    def _fake(self, tensor: Tensor) -> Tensor:
        plain = isinstance(tensor, FakeTensor) or type(tensor) in (Tensor, nn.Parameter)
        if not plain or tensor.layout is not torch.strided:
            return self.mode.from_tensor(tensor, static_shapes=True)
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        with self.mode:
            twin = self.storages.get(storage._cdata)
            if twin is None:
                twin = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
                self.storages[storage._cdata] = twin
            made = torch.empty(0, dtype=tensor.dtype)
            made.set_(twin, tensor.storage_offset(), tensor.size(), tensor.stride())
            return made


def copy_of(value: Any, mode: FakeTensorMode, *models: nn.Module) -> Any:
    """A deep copy on fake tensors of ``mode``; gradients are not copied. ``models`` are those inside ``value``."""
    generators = {
        id(g): g
        for model in models
        for m in model.modules()
        for g in vars(m).values()
        if isinstance(g, torch.Generator)
    }
    with _Copy(mode):
        # A generator is copied through a tensor with its state, which must not be fake.
        return copy.deepcopy(value, {key: g.clone_state() for key, g in generators.items()})


class Corrected(TorchDispatchMode):
    """Where torch's predictions for fake tensors need help.

    Norms of low-precision inputs with float32 weights keep their statistics in float32, and the gradient of a group
    norm's input has the input's type. Views, and sums and products with numbers, get the strides that they truly have
    in dimensions of size 1: these decide whether a tensor of batch 1 passes for channels-last, and so what copies it.
    With ``scalars``, whoever asks for a value gets 1000: optimizers read their step counts, as late in a run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scalars = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM and self.scalars:
            dtype = args[0].dtype
            return dtype == torch.bool or (1000.0 if dtype.is_floating_point else 1000)
        result = func(*args, **(kwargs or {}))
        if func in _WEIGHT_OF_NORM:
            out, mean, rstd, *more = result
            weight = args[_WEIGHT_OF_NORM[func]]
            if weight is not None and weight.dtype is torch.float32 and mean.dtype is not torch.float32:
                return out, mean.float(), rstd.float(), *more
        elif func is _GROUP_NORM_BACKWARD and result[0] is not None:
            return result[0].to(args[1].dtype), *result[1:]
        elif func is _VIEW and 1 in result.shape:
            strides = _strides(args[0].shape, args[0].stride(), result.shape)
            if strides is not None and strides != result.stride():
                return result.as_strided(result.shape, strides, result.storage_offset())
        elif func in _BINARY and 1 in result.shape and any(_shape(arg) != result.shape for arg in args):
            with no_dispatch():  # torch.empty is told of no mode: its meta tensors are not fake
                strides = func(*map(_meta, args), **(kwargs or {})).stride()
            if strides != result.stride():
                return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device)
        return result

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer for values that are asked for inside."""
        self.scalars = True
        try:
            yield
        finally:
            self.scalars = False


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def _meta(value: Any) -> Tensor:
    if not isinstance(value, Tensor):  # a number, whose type has no say in the strides
        return torch.empty((), device="meta")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _strides(old: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a view, as computeStride_impl in ATen/TensorUtils.cpp; None if there is no such view."""
    if not old or not new or 0 in old:
        return None
    made = [0] * len(new)
    at, base, size, filled = len(new) - 1, strides[-1], 1, 1
    for d in reversed(range(len(old))):
        size *= old[d]
        if d and (old[d - 1] == 1 or strides[d - 1] == size * base):
            continue  # the dimension before belongs to the same chunk of memory
        while at >= 0 and (filled < size or new[at] == 1):
            made[at] = filled * base
            filled *= new[at]
            at -= 1
        if filled != size:
            return None
        if d:
            base, size, filled = strides[d - 1], 1, 1
    return tuple(made) if at == -1 else None
