"""Values that are made again in backward rather than kept: what one forward saved, and how each of it came about.

Most of what autograd keeps is the result of a cheap operation (`cheap.py`) on something else that is kept: a norm's
input and its output and the activation of that and its dropout are four tensors, three of which follow from the first.
A :class:`Recording` is a function mode that notes by which call such a result was made, and a pair of saved-tensor
hooks. When autograd saves a tensor, the hooks decide: is it cheaper, in bytes, to keep what its calls began with? What
most of them began with is kept anyway, for the derivative of a norm or as a skip connection. Then autograd gets a
:class:`Saved` that makes the same calls again.

Nothing about derivatives is written here. Backward runs autograd's own functions on tensors that come from the same
kernels with the same inputs under the same autocast state, so gradients are those of the untouched model bit for bit,
and double backward works. Python code of the model does not run again.

What is made again on the way to one tensor, or comes back from hooks further out, stays for as long as others wait
for it: a norm's output is made once, for the convolution behind its activation and for the activation's own derivative.

What calls begin with is kept through the hooks in force around the recording. So inside a checkpoint a recomputation
makes fewer tensors at a time, and what an offload moves is what is kept.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from memopt import cheap
from memopt.deferred import StandIn
from memopt.deferred.value import saving_hooks
from memopt.saved import Pack, Passed, Stays, Unpack, check_version
from memopt.tensors import PLAIN, is_memory, storage_of, version_of

DEEP = 16
"""Calls one after another that are made again at most."""
RECENT = 16
"""Calls for which something that nobody keeps is held, in case a result of it is saved."""
SMALL_BUFFER = 1 << 16
"""Bytes of a buffer of which a copy is kept to make something from it again."""
_LOCK = threading.RLock()  # autograd has a thread for each device, and users may have more


class Geometry:
    """How a tensor lies in its storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor that lies like this in another's storage."""
        if tensor.size() == self.size and tensor.stride() == self.stride and tensor.storage_offset() == self.offset:
            return tensor
        return tensor.as_strided(self.size, self.stride, self.offset)


class Value:
    """What is in a storage: held here, kept by hooks further out, or to be made by a call.

    Args:
        tensor: has the storage.
        call: gives a tensor of the same storage size; None: the tensor is held.
    """

    def __init__(self, tensor: Tensor, call: Call | None = None) -> None:
        self.dtype, self.bytes, self.version = tensor.dtype, tensor.untyped_storage().nbytes(), version_of(tensor)
        self.call = call
        self.held: Tensor | Stays | Passed | _Parameter | None = tensor.detach() if call is None else None
        self.kept = self.stale = False
        """Whether it is held for good, and not only for a while in case it is needed; whether it was written to."""
        self.depth: int = 0 if call is None else 1 + max(value.depth for value in call.values())
        self.near: Tensor | None = None
        self.waiting: weakref.WeakSet[Saved] = weakref.WeakSet()
        """What backward has yet to ask for that is made from this."""
        self.asked: weakref.WeakSet[Saved] = weakref.WeakSet()

    @classmethod
    def free(cls, tensor: Tensor) -> Value:
        """A parameter: the model keeps it, and it may be elsewhere meanwhile."""
        value = cls(tensor, None)
        value.held, value.kept, value.bytes = _Parameter(tensor), True, 0
        return value

    def path(self) -> list[Value]:
        """This value and all that making it needs, each once."""
        found: dict[Value, None] = {}
        coming = [self]
        while coming:
            value = coming.pop()
            if value not in found:
                found[value] = None
                coming += value.call.values() if value.call is not None else ()
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
            self.held = Stays(tensor) if outer is None else Passed(outer, tensor)

    def get(self) -> Tensor:
        """A tensor with this content."""
        if self.near is not None:
            return self.near
        if self.call is not None:
            made = self.call()
        else:
            assert self.held is not None
            made = self.held if isinstance(self.held, Tensor) else self.held.tensor()
        if len(self.waiting) > 1 and not isinstance(self.held, Stays):
            self.near = made
        return made

    def done(self, saved: Saved) -> None:
        """Let go of what is near, if nobody else waits for it."""
        self.waiting.discard(saved)
        self.asked.add(saved)
        if not self.waiting:  # the next backward through a retained graph begins anew
            self.near = None
            self.waiting, self.asked = self.asked, self.waiting


class _Parameter:
    """A parameter; another pass may have moved its data away from the device."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.device, self.version = parameter, parameter.device, version_of(parameter)

    def tensor(self) -> Tensor:
        check_version(self.parameter, self.version)
        return self.parameter.detach().to(self.device)


class Here(Stays):
    """A tensor that is kept as it is."""

    def holds(self) -> list[Tensor]:
        """The tensors that are kept here."""
        return [self.kept]


class Argument:
    """A tensor among the arguments of a call."""

    def __init__(self, value: Value, tensor: Tensor) -> None:
        self.value, self.geometry = value, Geometry(tensor)

    def get(self) -> Tensor:
        return self.geometry.of(self.value.get())


class Call:
    """A call that can be made again."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.autocast = cheap.autocast_state(device)

    def values(self) -> Iterator[Value]:
        return (leaf.value for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Argument))

    def __call__(self) -> Tensor:
        args, kwargs = _mapped((self.args, self.kwargs), lambda x: x.get() if isinstance(x, Argument) else x)
        with torch.no_grad(), torch._C.DisableTorchFunction(), cheap.autocast_as(self.autocast):
            made: Tensor = self.func(*args, **kwargs)
            return made


class Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, value: Value, tensor: Tensor) -> None:
        self.value, self.geometry = value, Geometry(tensor)
        self.path: list[Value] = []

    def waits(self) -> None:
        """Tell those concerned that it will be asked for."""
        self.path = self.value.path()
        for value in self.path:
            value.waiting.add(self)

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


def unpack(saved: Any) -> Tensor:
    """The hook that goes with ``Recording.pack``."""
    tensor: Tensor = saved.tensor()
    return tensor


class Recording(TorchFunctionMode):
    """While active, what autograd saves is kept by what it was made from, where that takes fewer bytes.

    Args:
        outer: hooks further out, which get what is kept; None: it is kept here.
        parameters: storages that the model keeps.
        buffers: storages that it keeps and may write to at any time.
        least: bytes; smaller storages are kept as they are.
        counts: gets the numbers of what is made again.
    """

    def __init__(
        self,
        outer: tuple[Pack, Unpack] | None,
        parameters: set[int],
        buffers: set[int],
        least: int,
        counts: Counter[str],
    ) -> None:
        super().__init__()
        self.outer, self.least, self.counts = outer, least, counts
        self.parameters, self.buffers = parameters, buffers
        self.hooks: Any = None
        self._values = WeakIdKeyDictionary()  # by storage
        self._borrowed: deque[tuple[int, weakref.ref[Value]]] = deque()
        self._calls = 0
        self._undecided: list[tuple[Saved, Tensor]] | None = None

    @property
    def on(self) -> bool:
        """Whether what autograd saves comes here."""
        return torch.is_grad_enabled() and self.hooks == saving_hooks()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Be the mode and the hooks of a forward."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
            self.hooks = saving_hooks()
            _running.recordings.append(self)
            try:
                with self:
                    yield
            finally:
                _running.recordings.pop()
                while self._borrowed:
                    self._let_go()

    # --- what autograd saves -------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """What stands for a tensor until backward."""
        if not is_memory(tensor) or tensor.is_inference() or tensor.untyped_storage().nbytes() < self.least:
            return self._as_it_is(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata in self.parameters or storage._cdata in self.buffers:
            return self._as_it_is(tensor)
        value = self._known(tensor)
        if value is None:
            value = Value(tensor)
            self._remember(tensor, value)
        saved = Saved(value, tensor)
        if self._undecided is None:
            self._decide(saved, tensor)
        else:  # may be the result of this very call
            self._undecided.append((saved, tensor.detach()))
        return saved

    def _as_it_is(self, tensor: Tensor) -> Any:
        return Here(tensor) if self.outer is None else Passed(self.outer, tensor)

    def _decide(self, saved: Saved, tensor: Tensor) -> None:
        value = saved.value
        if value.call is not None:
            sources = [source for source in value.path() if source.call is None]
            gone = any(source.gone for source in sources)
            if gone or sum(source.bytes for source in sources if not source.kept) >= value.bytes:
                value.keep(tensor, self.outer)
                self._remember(tensor, value)
            else:
                for source in sources:
                    source.keep(None, self.outer)
                self.counts["tensors made again"] += 1
                self.counts["bytes not kept"] += tensor.nbytes
        else:
            value.keep(None, self.outer)
        saved.waits()

    # --- what the model computes ---------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the model is; its compiler decides what to keep
            return func(*args, **kwargs)
        if cheap.writes(func, args, kwargs):
            self._settle([*args[:1], kwargs.get("out")])
            if isinstance(args[0] if args else None, Tensor) and storage_of(args[0]) in self.buffers:
                return func(*args, **kwargs)
        if not self.on:
            return func(*args, **kwargs)
        if func in cheap.PRODUCTS:
            return func(*self._lowered(args), **kwargs)
        again = cheap.OPERATIONS.get(func)
        if again is None or "out" in kwargs:
            return func(*args, **kwargs)
        args = _mapped(args, lambda arg: arg.make(func.__name__) if isinstance(arg, StandIn) and arg.moves else arg)
        leaves = list(_leaves((args, kwargs)))
        if not all(map(self._usable, leaves)) or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return func(*args, **kwargs)
        return self._made(func, again, args, kwargs)

    def _made(self, func: Any, again: cheap.Again, args: Any, kwargs: Any) -> Any:
        if func in cheap.JOINS:
            args = _mapped(args, self._with_own_gradient)
        how = again(func, args, kwargs)
        if how is None:
            return func(*args, **kwargs)
        compute, replay = how
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        target = args[0] if cheap.writes(func, args, kwargs) else None
        self._calls += 1
        while self._borrowed and self._borrowed[0][0] < self._calls - RECENT:
            self._let_go()
        # Before the call, which may write to them.
        given = _mapped((replay.args, replay.kwargs), self._argument)
        call = Call(replay.func, given[0], given[1], tensors[0].device)
        self._undecided = []
        try:
            result = compute(*args, **kwargs)
            if type(result) in PLAIN and is_memory(result):
                storage = result.untyped_storage()
                fresh = storage._cdata not in before and result.storage_offset() == 0
                if (fresh or result is target) and storage.nbytes() == result.nbytes:
                    self._record(result, call)
            if call.autocast[1] and func in cheap.WIDENED:
                self._find_cast([x for x in tensors if x.shape == tensors[0].shape])
        finally:
            undecided, self._undecided = self._undecided, None
            for saved, tensor in undecided:
                self._decide(saved, tensor)
        return result

    def _record(self, result: Tensor, call: Call) -> None:
        """Note how a result was made; also for one that was saved while it was."""
        value = Value(result, call)
        if value.depth > DEEP:
            return
        self._remember(result, value)
        storage = storage_of(result)
        for saved, tensor in self._undecided or ():
            if storage_of(tensor) == storage and saved.value.version == value.version:
                saved.value = value

    def _find_cast(self, given: list[Tensor]) -> None:
        """Note how autocast, which does not show, has made what was saved of an operation's only input."""
        x = given[0]
        if len(given) > 1 or x.dtype not in (torch.float16, torch.bfloat16):
            return
        for saved, tensor in self._undecided or ():
            value = saved.value
            if value.call is None and not value.kept and (tensor.dtype, tensor.shape) == (torch.float32, x.shape):
                saved.value = Value(tensor, Call(Tensor.to, (self._argument(x), torch.float32), {}, x.device))
                self._remember(tensor, saved.value)

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()._cdata
        if storage in self.buffers:
            leaf = leaf.detach().clone()
            return Argument(Value(leaf), leaf)
        value = self._known(leaf)
        if value is None:
            if storage in self.parameters:
                value = Value.free(leaf)
                self._remember(leaf, value)
                return Argument(value, leaf)
            value = Value(leaf)
            self._borrowed.append((self._calls, weakref.ref(value)))
            self._remember(leaf, value)
        return Argument(value, leaf)

    def _known(self, tensor: Tensor) -> Value | None:
        """What is known of the content of a tensor's storage."""
        found = self._values.get(tensor.untyped_storage())
        value: Value | None = found() if isinstance(found, weakref.ref) else found
        same = value is not None and value.version == version_of(tensor) and value.dtype == tensor.dtype
        return value if same else None

    def _remember(self, tensor: Tensor, value: Value) -> None:
        # What has the storage itself lives as long as something needs it; how to make it, as long as the storage. What
        # hooks further out keep is not had here, and a recomputation must find the same known as forward did.
        here = value.call is None and (self.outer is None or not value.kept)
        self._values[tensor.untyped_storage()] = weakref.ref(value) if here else value

    def _with_own_gradient(self, leaf: Any) -> Any:
        """A part of a concatenation; one that is used elsewhere, too, gets a gradient that keeps no others."""
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.nbytes >= self.least:
            value = self._known(leaf)
            if value is not None and value.kept:
                return cheap.OwnGradient.apply(leaf)
        return leaf

    def _usable(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return not isinstance(leaf, StandIn)
        if not is_memory(leaf) or leaf.is_inference():
            return False
        storage = leaf.untyped_storage()
        return storage._cdata not in self.buffers or storage.nbytes() <= SMALL_BUFFER

    def _let_go(self) -> None:
        value = self._borrowed.popleft()[1]()
        if value is not None and not value.kept and value.call is None:
            value.held = None

    def _lowered(self, args: Any) -> Any:
        """A product's arguments, the first cast as autocast would, but where it is seen."""
        x = args[0]
        dtype = cheap.lower_dtype(x) if isinstance(x, Tensor) and self._usable(x) else None
        if dtype is None or self._known(x) is None:
            return args
        return (self._made(Tensor.to, cheap.plainly, (x, dtype), {}), *args[1:])

    def _settle(self, written: list[Any]) -> None:
        """Before memory is changed: keep a copy of what others are made from."""
        for tensor in _leaves(written):
            if isinstance(tensor, Tensor) and is_memory(tensor) and not tensor.is_inference():
                value = self._known(tensor)
                if value is None or value.call is not None:
                    continue
                if any(saved.value is not value for saved in value.waiting):
                    value.kept = False
                    value.keep(tensor.detach().as_strided(*_whole(tensor)).clone(), self.outer)
                else:
                    value.stale = True


def _whole(tensor: Tensor) -> tuple[list[int], list[int], int]:
    """The geometry of all of a tensor's storage."""
    return [tensor.untyped_storage().nbytes() // tensor.itemsize], [1], 0


class _Running(threading.local):
    def __init__(self) -> None:
        self.recordings: list[Recording] = []


_running = _Running()


def recording() -> Recording | None:
    """The recording that gets what autograd saves here."""
    for found in reversed(_running.recordings):
        if found.hooks == saving_hooks():
            return found
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested tuples, lists and dicts with other leaves."""
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)
