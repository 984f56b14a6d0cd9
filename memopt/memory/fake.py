"""A model without its data: copies on fake tensors, which know shapes, types and storages, and nothing else.

``copy_of`` deep-copies any objects (a model, its optimizer, its inputs) in one go, so that what they share stays
shared; every tensor becomes a fake one on the CPU, whatever device it was on. Tensors that share a storage share a
fake one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import types
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from memopt.errors import InputError, MemoptError


def new_mode() -> FakeTensorMode:
    """A fake mode in which real constants (a table in a closure, say) become fake as they are used."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def mode_of(model: nn.Module) -> FakeTensorMode | None:
    """The fake mode that a model was built in, or None."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return None


def active() -> bool:
    """Whether tensors that are made now are fake."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def copy_of(value: Any, mode: FakeTensorMode, *models: nn.Module) -> Any:
    """A deep copy on fake tensors of ``mode``; gradients are not copied. ``models`` are those inside ``value``.

    Raises:
        InputError: a module has not got its parameters yet.
        MemoptError: a tensor is of a kind that has no fake twin.
    """
    return Copies(mode).of(value, *models)


class Copies:
    """Knows the fake twin of each tensor that it copied; makes one for any other."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.fakes = False
        """Whether tensors were copied that had been fake already."""
        self.hooked = 0
        """Parameters with hooks, which the copies do not have."""
        self._copies = WeakTensorKeyDictionary()
        self._owned = WeakTensorKeyDictionary()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._copied_storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self._alive: list[Any] = []  # so that no address is used twice

    def of(self, value: Any, *models: nn.Module) -> Any:
        """As :func:`copy_of`."""
        tensors = []
        for model in models:
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                if is_lazy(tensor):
                    raise InputError(
                        f"{name} of {type(model).__name__} gets its shape when the model is called: call the model "
                        "once before it is profiled"
                    )
                tensors.append(tensor)
                self.hooked += bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
        # A generator is copied through a tensor with its state, which must not be fake.
        generators = (
            g for m in models for s in m.modules() for g in vars(s).values() if isinstance(g, torch.Generator)
        )
        memo: dict[int, Any] = {id(g): g.clone_state() for g in generators}
        with _Copying(self):
            for tensor in tensors:
                if isinstance(tensor, nn.Parameter):  # whose own __deepcopy__ calls the class, and whose class knows
                    memo.setdefault(id(tensor), self.fake(tensor))
            made = copy.deepcopy(value, memo)
            # What deepcopy keeps alive is what it has copied; the list grows as attributes are copied.
            for original in itertools.chain(tensors, memo.get(id(memo), ())):
                if isinstance(original, (Tensor, torch.optim.Optimizer)) and id(original) in memo:
                    _copy_attributes(original, memo[id(original)], memo)
        for original in itertools.chain(tensors, memo.get(id(memo), ())):
            if isinstance(original, Tensor) and id(original) in memo:
                self._copies[original] = weakref.ref(memo[id(original)])
                self.fakes |= isinstance(original, FakeTensor)
        for tensor in tensors:
            self._owned[tensor] = True
        # From now on copies die as their owners drop them.
        self._copied_storages.update(self._storages)
        self._storages.clear()
        return made

    def owned(self, original: Tensor) -> bool:
        """Whether it is a parameter or buffer of the models that were copied."""
        return original in self._owned

    def copied(self, original: Tensor) -> Tensor | None:
        """The copy of a tensor, if it was copied and still exists."""
        ref = self._copies.get(original)
        return None if ref is None else cast("Tensor | None", ref())

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same shape, strides and type, over the fake twin of its storage."""
        with torch._C.DisableTorchFunctionSubclass():
            made = self.plain(tensor).requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        if type(made) is FakeTensor and type(tensor) not in (Tensor, nn.Parameter, FakeTensor):
            kind = type(tensor) if isinstance(tensor, FakeTensor) else _fake_class(type(tensor))
            object.__setattr__(made, "__class__", kind)
        return made

    def plain(self, tensor: Tensor) -> Tensor:
        """The same without the tensor's class and its wish for gradients."""
        if is_traceable_wrapper_subclass(tensor):
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)
        if tensor.layout is torch.sparse_coo:
            with contextlib.nullcontext() if isinstance(tensor, FakeTensor) else no_dispatch():
                indices, values, coalesced = tensor._indices(), tensor._values(), tensor.is_coalesced()
            indices, values = self.plain(indices), self.plain(values)
            with self.mode:
                return torch.sparse_coo_tensor(
                    indices, values, tensor.shape, is_coalesced=coalesced, check_invariants=False
                )
        if tensor.layout is not torch.strided or not is_plain(type(tensor)):
            raise MemoptError(
                f"a {type(tensor).__name__} of layout {tensor.layout} has no fake twin; profile it on true tensors: "
                "real=True, or --real"
            )
        storage = tensor.untyped_storage()
        with self.mode:
            made = torch.empty(0, dtype=tensor.dtype)
            made.set_(self._storage(storage), tensor.storage_offset(), tensor.size(), tensor.stride())
            return made

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        key = storage._cdata
        twin = self._storages.get(key)
        if twin is None:
            twin = self._copied_storages.get(key)
        if twin is None:
            twin = self._storages[key] = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
            self._alive.append(storage)
        return twin


class _Copying(TorchFunctionMode):
    """While active, ``copy.deepcopy`` and ``clone`` of a tensor give a fake one."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            made = memo[id(tensor)] = self.copies.fake(tensor)
            return made
        if func is Tensor.clone:  # as nn.Parameter's __deepcopy__ does with its data
            return self.copies.fake(args[0])
        return func(*args, **(kwargs or {}))


def is_plain(kind: type[Tensor]) -> bool:
    """Whether tensors of a class behave as any tensor does."""
    function: Any = kind.__torch_function__
    dispatch: Any = kind.__torch_dispatch__
    as_usual = function is torch._C._disabled_torch_function_impl or (
        getattr(function, "__func__", None) is getattr(Tensor.__torch_function__, "__func__", ())
    )
    return as_usual and (issubclass(kind, FakeTensor) or dispatch is Tensor.__torch_dispatch__)


@functools.cache
def _fake_class(kind: type[Tensor]) -> type[Tensor]:
    """A class for fake tensors that pass for ``kind``; what operations make of them is plain."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    try:
        made = types.new_class(kind.__name__, (FakeTensor, kind), {}, lambda namespace: namespace.update(names))
    except TypeError:  # a layout of its own
        return FakeTensor
    return cast("type[Tensor]", made)


def _copy_attributes(original: Any, made: Any, memo: dict[int, Any]) -> None:
    """Copy what an object has besides, which ``copy.deepcopy`` leaves out for tensors and optimizers."""
    for name, value in list(vars(original).items()):
        # A step on the instance that is a function, as LR schedulers make it, would step the original.
        if name in vars(made) or (name == "step" and isinstance(value, types.FunctionType)):
            continue
        with contextlib.suppress(Exception):  # what cannot be copied is shared
            value = copy.deepcopy(value, memo)
        vars(made)[name] = value
