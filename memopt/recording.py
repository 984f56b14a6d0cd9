"""Finding out how a model's tensors came about, and deciding which of those that autograd saves are made again.

A :class:`Recording` is a function mode and a pair of saved-tensor hooks around a forward. As the mode it notes each
cheap operation (`cheap.py`) with the values it was given (`remat.py`). As hooks it decides for each tensor: if what its
calls began with is kept anyway, or is smaller, that is kept in its place.

In a checkpoint, forward and recomputation must decide alike. So nothing depends on how long Python objects live or on
the sizes of storages, which may be others the second time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from memopt import cheap
from memopt.deferred import StandIn
from memopt.deferred.value import saving_hooks
from memopt.remat import Argument, Call, Here, Saved, Value, Weight, bytes_of, leaves, mapped
from memopt.saved import Pack, Passed, Unpack, hooks_allowed, owner_in_force, unpack
from memopt.tensors import PLAIN, is_memory, span, storage_of, unseen, version_of

DEEP = 16
"""Calls one after another that are made again at most."""
RECENT = 16
"""Calls for which something that nobody keeps is held, in case a result of it is saved."""
SMALL_BUFFER = 1 << 16
"""Bytes of a buffer of which a copy is kept to make something from it again."""


class Recording(TorchFunctionMode):
    """While active, what autograd saves is kept by what it was made from, where that takes fewer bytes.

    Args:
        outer: hooks further out, which get what is kept; None: it is kept here.
        parameters: what the model keeps.
        buffers: what it keeps and may write to at any time.
        least: bytes; smaller storages are kept as they are.
        counts: gets the numbers of what is made again.
    """

    def __init__(
        self,
        outer: tuple[Pack, Unpack] | None,
        parameters: Iterable[Tensor],
        buffers: Iterable[Tensor],
        least: int,
        counts: Counter[str],
    ) -> None:
        super().__init__()
        self.outer, self.least, self.counts = outer, least, counts
        # Hooks further out may be those that let weights come and go, which have other storages then.
        self.parameters, self.buffers = _Storages(parameters if outer is None else ()), _Storages(buffers)
        self.hooks: Any = None
        self._values = WeakIdKeyDictionary()  # by storage
        self._borrowed: deque[tuple[int, weakref.ref[Value]]] = deque()
        self._calls = 0
        self._undecided: list[tuple[Saved, Tensor]] | None = None

    @property
    def on(self) -> bool:
        """Whether what autograd saves comes here."""
        if not torch.is_grad_enabled() or not hooks_allowed():
            return False
        return self.hooks == saving_hooks() or recording() is self

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Be the mode and the hooks of a forward."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
            self.hooks = saving_hooks()
            try:
                with self:
                    yield
            finally:
                while self._borrowed:
                    self._let_go()
                # Others may hold the hooks, and by them this, until backward.
                self._values, self.hooks = WeakIdKeyDictionary(), ()

    # --- what autograd saves -------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """What stands for a tensor until backward."""
        if not is_memory(tensor) or tensor.is_inference() or bytes_of(tensor) < self.least:
            return self._as_it_is(tensor)
        storage = tensor.untyped_storage()
        if self.parameters.has(storage) or self.buffers.has(storage):
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
        again, writes = cheap.OPERATIONS.get(func), cheap.writes(func, args, kwargs)
        if again is None and not writes and func not in cheap.PRODUCTS:
            return func(*args, **kwargs)
        if writes:
            target = cheap.first(args, kwargs)
            with unseen():
                self._settle([target, kwargs.get("out")])
                buffer = isinstance(target, Tensor) and self._is_buffer(target)
            if buffer:
                return func(*args, **kwargs)
        if not self.on:
            return func(*args, **kwargs)
        if func in cheap.PRODUCTS:
            return func(*self._lowered(args[:1]), *args[1:], **kwargs)
        if again is None or "out" in kwargs:
            return func(*args, **kwargs)
        args = self._brought(func, args)
        result = None
        if func in cheap.CASTS:
            result = func(*args, **kwargs)
            if result is cheap.first(args, kwargs) or not isinstance(result, Tensor):
                return result
            again = cheap.done(result)
        with unseen():
            tensors = self._usable(leaves((args, kwargs)))
        if tensors:
            return self._made(func, again, args, kwargs, tensors)
        return func(*args, **kwargs) if result is None else result

    def _made(self, func: Any, again: cheap.Again, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        with unseen():
            how = again(func, args, kwargs)
            if how is not None:
                compute, replay = how
                before = {storage_of(tensor) for tensor in tensors}
                target = cheap.first(args, kwargs) if cheap.writes(func, args, kwargs) else None
                self._calls += 1
                while self._borrowed and self._borrowed[0][0] < self._calls - RECENT:
                    self._let_go()
                # Before the call, which may write to them.
                given = mapped((replay.args, replay.kwargs), self._argument)
                call = Call(replay.func, given[0], given[1], tensors[0].device)
        if how is None:
            return func(*args, **kwargs)
        self._undecided = []
        try:
            result = compute(*args, **kwargs)
            with unseen():
                if type(result) in PLAIN and is_memory(result):
                    storage = result.untyped_storage()
                    fresh = storage._cdata not in before and result.storage_offset() == 0
                    if (fresh or result is target) and storage.nbytes() == result.nbytes:
                        self._record(result, call)
                if call.autocast[1] and func in cheap.WIDENED:
                    self._find_cast([x for x in tensors if x.shape == tensors[0].shape])
        finally:
            undecided, self._undecided = self._undecided, None
            with unseen():
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
                saved.be(value, tensor)

    def _find_cast(self, given: list[Tensor]) -> None:
        """Note how autocast, which does not show, has made what was saved of an operation's only input."""
        x = given[0]
        if len(given) > 1 or x.dtype not in (torch.float16, torch.bfloat16):
            return
        for saved, tensor in self._undecided or ():
            value = saved.value
            if value.call is None and not value.kept and (tensor.dtype, tensor.shape) == (torch.float32, x.shape):
                saved.be(Value(tensor, Call(Tensor.to, (self._argument(x), torch.float32), {}, x.device)), tensor)
                self._remember(tensor, saved.value)

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if self.buffers.has(storage):
            leaf = leaf.detach().clone()
            return Argument(Value(leaf), leaf)
        if self.parameters.has(storage) or isinstance(leaf, nn.Parameter):
            if self.outer is None:
                return Weight(leaf)
            # Known by itself, and handed on at once: weights that come and go may have one another's storages.
            weight = Value(leaf)
            weight.keep(None, self.outer)
            return Argument(weight, leaf)
        value = self._known(leaf)
        if value is None or value.gone:
            value = Value(leaf)
            self._borrowed.append((self._calls, weakref.ref(value)))
            self._remember(leaf, value)
        return Argument(value, leaf)

    def _known(self, tensor: Tensor) -> Value | None:
        """What is known of the content of a tensor's storage."""
        found = self._values.get(tensor.untyped_storage())
        value: Value | None = found() if isinstance(found, weakref.ref) else found
        if value is None or value.version != version_of(tensor) or value.dtype != tensor.dtype:
            return None
        start, stop = span(tensor)
        return value if value.start <= start and stop <= value.stop else None

    def _remember(self, tensor: Tensor, value: Value) -> None:
        # What has the storage itself lives as long as something needs it; how to make it, as long as the storage. What
        # hooks further out keep is not had here, and a recomputation must find the same known as forward did.
        here = value.call is None and (self.outer is None or not value.kept)
        self._values[tensor.untyped_storage()] = weakref.ref(value) if here else value

    def _brought(self, func: Any, args: Any) -> Any:
        """The arguments of an operation, with tensors for skip connections that may be away.

        Where one part of a concatenation is used elsewhere, too, its gradient waits: the parts get gradients of their
        own then, which do not keep that of the whole.
        """
        given = [leaf for leaf in leaves(args) if isinstance(leaf, (Tensor, StandIn))]
        skips = [leaf for leaf in given if isinstance(leaf, StandIn) and leaf.moves]
        made = {id(skip): skip.make(func.__name__) for skip in skips}
        if made:
            args = mapped(args, lambda leaf: made.get(id(leaf), leaf))
        if func in cheap.JOINS and (made or any(map(self._is_kept, given))):
            args = mapped(args, self._with_own_gradient)
        return args

    def _is_kept(self, leaf: Any) -> bool:
        with unseen():
            value = self._known(leaf) if isinstance(leaf, Tensor) and is_memory(leaf) else None
        return value is not None and value.kept

    def _with_own_gradient(self, leaf: Any) -> Any:
        wants = isinstance(leaf, Tensor) and leaf.requires_grad and leaf.nbytes >= self.least
        return cheap.OwnGradient.apply(leaf) if wants else leaf

    def _is_buffer(self, tensor: Tensor) -> bool:
        return is_memory(tensor) and self.buffers.has(tensor.untyped_storage())

    def _usable(self, given: list[Any]) -> list[Tensor]:
        """The tensors a call is given; none if it could not be made again with them."""
        return [x for x in given if isinstance(x, Tensor)] if all(map(self._is_usable, given)) else []

    def _is_usable(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return not isinstance(leaf, StandIn)
        if not is_memory(leaf) or leaf.is_inference():
            return False
        storage = leaf.untyped_storage()
        return not self.buffers.has(storage) or storage.nbytes() <= SMALL_BUFFER

    def _let_go(self) -> None:
        value = self._borrowed.popleft()[1]()
        if value is not None and not value.kept and value.call is None:
            value.held = None

    def _lowered(self, inputs: Sequence[Any]) -> list[Any]:
        """A product's inputs, cast as autocast would, but where it is seen."""
        return [self._lower(x) if isinstance(x, Tensor) and self._is_usable(x) else x for x in inputs]

    def _lower(self, x: Tensor) -> Tensor:
        with unseen():
            dtype = cheap.lower_dtype(x)
        return x if dtype is None else self._made(Tensor.to, cheap.plainly, (x, dtype), {}, [x])

    def _settle(self, written: list[Any]) -> None:
        """Before memory is changed: keep a copy of what others are made from."""
        for tensor in leaves(written):
            if isinstance(tensor, Tensor) and is_memory(tensor) and not tensor.is_inference():
                value = self._known(tensor)
                if value is None or value.call is not None:
                    continue
                if any(saved.value is not value for saved in value.waiting):
                    value.kept = False
                    part = tensor.detach().as_strided((value.stop - value.start,), (1,), value.start)
                    value.keep(part.clone(), self.outer)
                else:
                    value.stale = True


class _Storages:
    """The storages of tensors, as far as they live: a later one may have the address of one that died."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors if is_memory(tensor)]
        self._known = {storage._cdata: StorageWeakRef(storage) for storage in storages}

    def has(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(storage._cdata)
        return known is not None and not known.expired()


def recording() -> Recording | None:
    """The recording that gets what autograd saves here."""
    return owner_in_force(Recording)
