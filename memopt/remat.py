"""Values that are made again in backward rather than kept: what one forward saved, and how each of it came about.

Most of what autograd keeps is the result of a cheap operation (`cheap.py`) on something else that is kept: a norm's
input and its output and the activation of that and its dropout are four tensors, three of which follow from the first.
A recording (`recording.py`) notes by which call such a result was made. When autograd saves a tensor, it decides: is it
cheaper, in bytes, to keep what its calls began with? What most of them began with is kept anyway, for the derivative of
a norm or as a skip connection. Then autograd gets a :class:`Saved` that makes the same calls again.

Nothing about derivatives is written here. Backward runs autograd's own functions on tensors that come from the same
kernels with the same inputs under the same autocast state, so gradients are those of the untouched model bit for bit,
and double backward works. Python code of the model does not run again.

What is made again on the way to one tensor, or comes back from hooks further out, stays for as long as others wait
for it: a norm's output is made once, for the convolution behind its activation and for the activation's own derivative.

What calls begin with is kept through the hooks in force around the recording. So inside a checkpoint a recomputation
makes fewer tensors at a time, and what an offload moves is what is kept.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memopt import cheap
from memopt.saved import Pack, Passed, Stays, Unpack, check_version, kept_by
from memopt.tensors import span, version_of

_LOCK = threading.RLock()  # autograd has a thread for each device, and users may have more


def bytes_of(tensor: Tensor) -> int:
    """The bytes of a tensor's elements. Not those of its storage: a recomputation may be given another one."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Geometry:
    """How a tensor lies within a value."""

    def __init__(self, tensor: Tensor, value: Value) -> None:
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset() - value.start

    def of(self, whole: Tensor) -> Tensor:
        """The tensor that lies like this in what is given for the value, perhaps in another storage."""
        if whole.size() == self.size and whole.stride() == self.stride and not self.offset:
            return whole
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class Value:
    """What is in a part of a storage: held here, kept by hooks further out, or to be made by a call.

    Args:
        tensor: spans the part.
        call: makes it; None: the tensor is held.
    """

    def __init__(self, tensor: Tensor, call: Call | None = None) -> None:
        self.dtype, self.bytes, self.version = tensor.dtype, bytes_of(tensor), version_of(tensor)
        self.start, self.stop = span(tensor)
        self.call = call
        self.held: Tensor | Stays | Passed | None = tensor.detach() if call is None else None
        self.kept = self.stale = False
        """Whether it is held for good, and not only for a while in case it is needed; whether it was written to."""
        self.depth: int = 0 if call is None else 1 + max((value.depth for value in call.values), default=0)
        self.near: Tensor | None = None

    @functools.cached_property
    def saved(self) -> weakref.WeakSet[Saved]:
        """What autograd keeps of it."""
        return weakref.WeakSet()

    @functools.cached_property
    def users(self) -> weakref.WeakSet[Value]:
        """What is made from it."""
        return weakref.WeakSet()

    @functools.cached_property
    def waiting(self) -> weakref.WeakSet[Saved]:
        """What backward has yet to ask for that is made from this."""
        return weakref.WeakSet()

    @functools.cached_property
    def asked(self) -> weakref.WeakSet[Saved]:
        """What it has asked for."""
        return weakref.WeakSet()

    def path(self) -> list[Value]:
        """This value and all that making it needs, each once."""
        found: dict[Value, None] = {}
        coming = [self]
        while coming:
            value = coming.pop()
            if value not in found:
                found[value] = None
                coming += value.call.values if value.call is not None else ()
        return list(found)

    @property
    def gone(self) -> bool:
        """Whether it can be had no more."""
        if self.call is not None:
            return False
        written = isinstance(self.held, Tensor) and version_of(self.held) != self.version
        return self.held is None or self.stale or written

    def keep(self, tensor: Tensor | None, outer: tuple[Pack, Unpack] | None) -> None:
        """Keep it from now on: what it holds, or this tensor."""
        if not self.kept:
            tensor = self.held if tensor is None else tensor  # type: ignore[assignment]
            assert isinstance(tensor, Tensor)
            self.call, self.kept = None, True
            self.held = kept_by(tensor, outer)

    def get(self) -> Tensor:
        """A tensor with this content."""
        if self.near is not None:
            return self.near
        if self.call is not None:
            made = self.call()
        else:
            assert self.held is not None
            made = self.held if isinstance(self.held, Tensor) else self.held.tensor()
        if not self.light and self.requests > 1 and not isinstance(self.held, Stays):
            self.near = made
        return made

    @property
    def light(self) -> bool:
        """Whether what it is made from is smaller, and waits in its place."""
        return self.call is not None and sum(value.bytes for value in self.call.values) < self.bytes

    @property
    def requests(self) -> int:
        """How often a backward asks for it."""
        return len(self.saved) + sum(user.requests if user.light else 1 for user in self.users)

    def done(self, saved: Saved) -> None:
        """Let go of what is near, if nobody else waits for it."""
        self.waiting.discard(saved)
        self.asked.add(saved)
        if not self.waiting:  # the next backward through a retained graph begins anew
            self.near = None
            self.waiting, self.asked = self.asked, self.waiting


class Here(Stays):
    """A tensor that is kept as it is."""

    def holds(self) -> list[Tensor]:
        """The tensors that are kept here."""
        return [self.kept]


class Argument:
    """A tensor among the arguments of a call."""

    def __init__(self, value: Value, tensor: Tensor) -> None:
        self.value, self.geometry = value, Geometry(tensor, value)

    def get(self) -> Tensor:
        return self.geometry.of(self.value.get())


class Weight:
    """A parameter among the arguments of a call: the model keeps it; another pass may have moved its data away."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.device, self.version = parameter, parameter.device, version_of(parameter)

    def get(self) -> Tensor:
        check_version(self.parameter, self.version)
        return self.parameter.detach().to(self.device)


class Call:
    """A call that can be made again."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.autocast = cheap.autocast_state(device)
        self.values = tuple(dict.fromkeys(leaf.value for leaf in leaves((args, kwargs)) if isinstance(leaf, Argument)))
        """What it needs, each once."""

    def __call__(self) -> Tensor:
        args, kwargs = mapped((self.args, self.kwargs), lambda x: x.get() if isinstance(x, (Argument, Weight)) else x)
        with torch.no_grad(), torch._C.DisableTorchFunction(), cheap.autocast_as(self.autocast):
            made: Tensor = self.func(*args, **kwargs)
            return made


class Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, value: Value, tensor: Tensor) -> None:
        self.path: list[Value] = []
        self.be(value, tensor)

    def be(self, value: Value, tensor: Tensor) -> None:
        """Stand for a tensor by a value that has it."""
        self.value, self.geometry = value, Geometry(tensor, value)

    def waits(self) -> None:
        """Tell those concerned that it will be asked for."""
        self.path = self.value.path()
        self.value.saved.add(self)
        for user in self.path:
            user.waiting.add(self)
            for value in user.call.values if user.call is not None else ():
                value.users.add(user)

    def holds(self) -> list[Tensor]:
        """The tensors that are kept here for it."""
        return [value.held.kept for value in self.path if isinstance(value.held, Stays)]

    def tensor(self) -> Tensor:
        """The tensor that autograd saved."""
        with torch.no_grad(), _LOCK:
            tensor = self.geometry.of(self.value.get())
            for value in self.path:
                value.done(self)
            return tensor


def leaves(value: Any) -> list[Any]:
    """What is in nested tuples, lists and dicts."""
    if not isinstance(value, (tuple, list, dict)):
        return [value]
    found = []
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (tuple, list, dict)):
            found += leaves(item)
        else:
            found.append(item)
    return found


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested tuples, lists and dicts with other leaves."""
    if isinstance(value, (tuple, list)):
        items = [mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value)
