"""Run true steps on a model and leave it as it was."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memopt.errors import InputError


@contextlib.contextmanager
def restored(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Sequence[nn.Module], inputs: Sequence[Tensor]
) -> Iterator[None]:
    """Put back, bit for bit, what steps inside change, also if they fail.

    That is: the parameters and buffers of the modules, their tensors, submodules and other attributes (the same
    objects as before; those that were added go), training modes, the inputs, all that the optimizer steps and its
    states, gradients, and the random states of torch, NumPy, Python and of generators in the modules. Copies are held
    on the CPU meanwhile. Gradients are set aside, so that the steps begin without any.

    Not put back: what is inside other objects, such as a list that a module fills, or in no module at all; and the
    states of optimizers that hooks step during backward, of which nothing is known here: a first step leaves the
    states it created.

    Raises:
        InputError: before any step, if a module is scripted or not yet initialized.
    """
    before = _Before()
    for root in (model, *extra):
        for path, module in root.named_modules():
            before.keep_module(module, f"{path or 'the model'}, a {type(module).__name__},")
    for tensor in inputs:
        before.keep_tensor(tensor)
    if optimizer is not None:
        before.keep_attributes(optimizer)
        before.keep(optimizer.param_groups)
        before.keep(optimizer.state)
    before.undo.append(partial(random.setstate, random.getstate()))
    before.undo.append(partial(np.random.set_state, np.random.get_state()))
    with torch.random.fork_rng(devices=sorted({t.device.index for t in before.leaves if t.device.type == "cuda"})):
        try:
            for tensor in before.leaves:
                tensor.grad = None
            yield
        finally:
            before.put_back()


class _Before:
    """How things were; each ``keep`` notes what undoes any change."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []
        self.leaves: list[Tensor] = []
        self.seen: dict[int, Any] = {}  # by id, storages by address; they stay alive

    def put_back(self) -> None:
        """Undo all. What fails keeps nothing else from it; the first error is raised in the end."""
        errors: list[BaseException] = []
        for undo in self.undo:
            try:
                with torch._C.DisableTorchFunctionSubclass():
                    undo()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def keep_module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{name} is scripted; profile it before torch.jit.script or torch.jit.trace")
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(map(is_lazy, tensors)):
            raise InputError(f"{name} is not initialized; call the model once before a profile of true steps")
        self.keep_attributes(module)
        for names in (module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set):
            self.undo.append(partial(_refill, names, names.copy()))
        for tensor in tensors:
            self.keep_tensor(tensor)

    def keep_attributes(self, owner: object) -> None:
        """What the names are bound to, and the contents of tensors and generators among that."""
        self.undo.append(partial(_refill, vars(owner), dict(vars(owner))))
        for value in vars(owner).values():
            if isinstance(value, Tensor):
                self.keep_tensor(value)
            elif isinstance(value, torch.Generator):
                self.undo.append(partial(value.set_state, value.get_state()))

    def keep(self, value: Any) -> Any:
        """Nested containers: they and the tensors in them stay the same objects, of all else there are copies."""
        if isinstance(value, Tensor):
            self.keep_tensor(value)
        elif isinstance(value, (dict, list, deque, tuple)):
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                items = {key: self.keep(item) for key, item in pairs}
                if not isinstance(value, tuple):
                    self.undo.append(partial(_refill, value, items))
        elif not callable(value):
            with contextlib.suppress(Exception):  # what cannot be copied stays
                return copy.deepcopy(value)
        return value

    def keep_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self.seen:
            return
        self.seen[id(tensor)] = tensor
        with torch._C.DisableTorchFunctionSubclass():
            if is_traceable_wrapper_subclass(tensor):
                for name in tensor.__tensor_flatten__()[0]:
                    inner = getattr(tensor, name)
                    self.undo.append(partial(_set, tensor, name, inner))
                    self.keep_tensor(inner)
            elif _is_plain(tensor):
                self.undo.append(partial(_place, tensor, tensor.detach()))
                self.keep_storage(tensor.untyped_storage())
            else:
                self.undo.append(partial(_copy, tensor, tensor.detach().to("cpu", copy=True)))
            if tensor.is_leaf:
                self.leaves.append(tensor)
                self.undo.append(partial(_be_leaf, tensor, tensor.requires_grad, tensor.grad))

    def keep_storage(self, storage: torch.UntypedStorage) -> None:
        """The bytes, once for all tensors that share them."""
        if storage._cdata not in self.seen and storage.device.type != "meta":
            self.seen[storage._cdata] = storage
            self.undo.append(partial(_write, storage, _bytes(storage).to("cpu", copy=True)))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a window on the bytes of its storage and no more."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or not torch._C._has_storage(tensor):
        return False
    return not (tensor.is_quantized or tensor.is_nested)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _write(storage: torch.UntypedStorage, value: Tensor) -> None:
    if storage.nbytes() != value.numel():
        storage.resize_(value.numel())
    now = _bytes(storage)
    if now.device.type != "cpu" or not torch.equal(now, value):  # inputs may be in read-only memory
        now.copy_(value)


def _copy(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _place(tensor: Tensor, alias: Tensor) -> None:
    """Make a tensor a window on the same part of the same storage as ``alias``."""
    now, before = (
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (tensor, alias)
    )
    if now != before:
        tensor.data = alias


def _be_leaf(tensor: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    if not tensor.is_leaf and not tensor._is_view():
        tensor.detach_()
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    tensor.grad = gradient


def _set(owner: object, name: str, value: object) -> None:
    if getattr(owner, name) is not value:
        setattr(owner, name, value)


def _refill(container: Any, items: Any) -> None:
    """Make a container hold these items again, in their order; those of a list are numbered."""
    if isinstance(container, (list, deque)):
        container.clear()
        container.extend(items.values())
        return
    if list(container) != list(items):
        container.clear()
    container.update(items)
