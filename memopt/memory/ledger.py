"""The account of live storages: every allocation that a tensor operation makes, until it dies.

A :class:`Ledger` is a dispatch mode. After each operation it looks at the storages of the results, and before it at
those of the arguments: what it has not seen before was there already. A storage is one allocation however many tensors
view it; a weak reference to it tells when it is freed, by Python or by C++. ``UntypedStorage.resize_`` is patched while
a ledger is active, because emptying a storage (as FSDP does) is no operation. The ledger holds nothing alive and works
on real tensors of any device and on fake ones.

An active dispatch mode changes one thing in torch: the autograd engine adds up the gradients that reach a tensor
over several paths in place where nobody else holds them, and out of place under a mode. The ledger recognises
these additions and counts them as they are without it: the sum takes the place of the first summand.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from memopt.errors import InputError
from memopt.tensors import storage_of

_ADD = torch.ops.aten.add.Tensor
_LIFT = torch.ops.aten.lift_fresh.default
_ACTIVE: list[Ledger] = []
_AWAY: dict[int, _Away] = {}
"""Storages that live off the device, also for ledgers that begin later."""
_resize = torch.UntypedStorage.resize_


class Record:
    """One storage: how large it is, where it is, and where it comes from."""

    __slots__ = ("bytes", "dtype", "key", "module", "op", "phase", "ref", "shape", "size", "tier", "trace")

    def __init__(self, key: int, tensor: Tensor, tier: str, op: str) -> None:
        self.key = key
        self.shape = () if tensor.is_nested else tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.tier = tier
        self.op = op
        """The operation that made it; empty if it was there before."""
        self.size = 0
        """Bytes of the storage."""
        self.bytes = 0
        """Bytes it counts for: rounded as the ledger rounds."""
        self.module = ""
        self.phase = "start"
        self.ref: weakref.ref[torch.UntypedStorage]
        self.trace: Any = None
        """What a subclass of the ledger keeps about it."""


class _Ref(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("record",)
    record: Record


class _Away(weakref.ref):  # type: ignore[type-arg]
    __slots__ = ("key", "tier")
    key: int
    tier: str


class Ledger(TorchDispatchMode):
    """Counts live bytes while it is active: ``total`` on the device, ``off_device`` by tier.

    Args:
        rounding: count each storage as a multiple of so many bytes; the CUDA allocator's is 512.
        device: the type of the device to account for. Storages on another one count for the tier of that name.
        fakes: count fake tensors, which otherwise count nothing.
    """

    def __init__(self, *, rounding: int = 1, device: str = "cpu", fakes: bool = False) -> None:
        super().__init__()
        if isinstance(rounding, bool) or not isinstance(rounding, int) or rounding < 1:
            raise InputError(f"rounding is a number of bytes, at least 1, not {rounding!r}")
        self.rounding, self.device, self.fakes = rounding, device, fakes
        self.live: dict[int, Record] = {}
        self.total = 0
        self.peak = 0
        self.off_device: dict[str, int] = {}
        self.quiet = False
        """True while operations of our own run, which are not the program's."""
        self.ops = 0
        """Operations so far."""
        self.func: Any = None
        """The operation that runs."""
        self.twin: Callable[[Tensor], Tensor] | None = None
        """What counts in place of a tensor, where operations are given something else."""
        self._tier: str | None = None
        """Of the results of the operation that runs, if not the device."""

    def see(self, tensor: Tensor, op: str = "", tier: str | None = None) -> list[Record]:
        """The records of a tensor's storages, counted from now on (on a tier) if they were not; usually one.

        Wrapper subclasses and sparse tensors have several.
        """
        return [record for part in parts_of(tensor) if (record := self._see(part, op, tier)) is not None]

    def _see(self, tensor: Tensor, op: str, tier: str | None) -> Record | None:
        if self.twin is not None:
            tensor = self.twin(tensor)
        try:
            storage = tensor.untyped_storage()
            key = storage._cdata
        except (NotImplementedError, RuntimeError):  # sparse, nested, functorch's wrappers
            return None
        record = self.live.get(key)
        if record is None:
            kind = tensor.device.type
            if kind == "meta" or (not self.fakes and isinstance(tensor, FakeTensor)):
                return None
            away = _AWAY.get(key)
            tier = tier or (away.tier if away else "device" if kind == self.device else kind)
            record = Record(key, tensor, tier, op)
            self._watch(record, storage, key)
            self.born(record)
        size = storage.nbytes()
        if size != record.size:
            self._resize(record, size)
        return record

    def _watch(self, record: Record, storage: torch.UntypedStorage, key: int) -> None:
        ref = _Ref(storage, self._died)
        ref.record = record
        record.ref, record.key = ref, key
        self.live[key] = record

    def _died(self, ref: Any) -> None:
        record: Record = ref.record
        if record.ref is ref:  # otherwise another storage has taken its place
            del self.live[record.key]
            self._resize(record, 0)

    def _resize(self, record: Record, size: int) -> None:
        record.size = size
        rounded = -(-size // self.rounding) * self.rounding
        change, record.bytes = rounded - record.bytes, rounded
        if record.tier == "device":
            self.total += change
            self.peak = max(self.peak, self.total)
        else:
            self.off_device[record.tier] = self.off_device.get(record.tier, 0) + change
        self.changed(record, change)

    def place(self, tensor: Tensor, tier: str, label: str = "") -> None:
        """Account for a tensor's storage under a tier: ``device``, ``cpu``, ``disk``; a label says what it is."""
        for record in self.see(tensor, tier=tier):
            if record.tier != tier:
                size = record.size
                self._resize(record, 0)
                record.tier = tier
                self._resize(record, size)
                self.placed(record)
            if label:
                self.labelled(record, label)

    def placed(self, record: Record) -> None:
        """For subclasses: a storage has moved to another tier."""

    def labelled(self, record: Record, label: str) -> None:
        """For subclasses: a storage belongs to a category."""

    def born(self, record: Record) -> None:
        """For subclasses: a storage was seen for the first time; its bytes come with ``changed``."""

    def changed(self, record: Record, change: int) -> None:
        """For subclasses: a storage now counts ``change`` bytes more (or less)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.quiet or _BOOKS.closed or func.namespace == "prim":  # prim.device and its like make no tensors
            return func(*args, **kwargs)
        self.ops += 1
        self.func = func
        self.begin(func)
        if func is not _LIFT:  # whose argument is the literal as Python built it, and whose result counts
            for tensor in _tensors((args, kwargs)):
                self.use(tensor)
        self._tier = _common_tier(args, kwargs) if _AWAY else None
        place = self._taken_over(args, func)
        result = func(*args, **kwargs)
        if place is not None:
            storage = result.untyped_storage()
            self.live.pop(place.key, None)
            self._watch(place, storage, storage._cdata)
        self.end(func, result)
        self.worked(func, args, kwargs, result)
        try:
            self.check()
        except BaseException:
            del result  # or the traceback would keep it
            raise
        return result

    def check(self) -> None:
        """For subclasses: may raise after an operation, whose result is then dropped."""

    def begin(self, func: Any) -> None:
        """For subclasses: an operation begins."""

    def use(self, tensor: Tensor) -> None:
        """An operation takes a tensor."""
        self.see(tensor)

    def end(self, func: Any, result: Any) -> None:
        """An operation has returned; count its results."""
        for tensor in _tensors(result):
            self.see(tensor, str(func._schema.name).replace("::", "."), self._tier)

    def worked(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """For subclasses: an operation has returned; how much work it was can be told from what it took and gave."""

    def _taken_over(self, args: Any, func: Any) -> Record | None:
        """The record that the sum keeps, if this is an addition that the engine does in place without a mode."""
        if func is not _ADD or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return None
        old, new = args[:2]
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)) or old.shape != new.shape:
            return None
        # As can_accumulate_inplace in torch/csrc/autograd/input_buffer.cpp: a dense tensor that only the engine holds.
        if old.dtype != new.dtype or not torch.ops.aten.is_non_overlapping_and_dense(old):
            return None
        if _holders(old) != sole_holders():
            return None
        return self.live.get(old.untyped_storage()._cdata)

    def __enter__(self) -> Any:
        sole_holders()
        if not _ACTIVE:
            torch.UntypedStorage.resize_ = _resize_and_tell  # type: ignore[method-assign,assignment]
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> Any:
        _ACTIVE.remove(self)
        if not _ACTIVE:
            torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign]
        return super().__exit__(*exc)


def active() -> tuple[Ledger, ...]:
    """The ledgers that count at the moment, innermost last."""
    return tuple(_ACTIVE)


def moved(tensor: Tensor, tier: str, label: str = "") -> None:
    """Tell all active ledgers that a tensor's bytes are not on the device but on a tier of this name.

    For passes that simulate moves on one device, or move to files. A label says what the bytes are for: one of the
    tracker's categories.
    """
    for ledger in _ACTIVE:
        ledger.place(tensor, tier, label)


def lives(tensor: Tensor, tier: str) -> None:
    """Tell all ledgers, now and later, where a tensor's bytes are that the program itself works with.

    What operations make of nothing but such tensors is in host memory, too.

    Args:
        tier: ``cpu``, ``disk`` or, when it has come back for good, ``device``.
    """
    storage = tensor.untyped_storage()
    if tier == "device":
        _AWAY.pop(storage._cdata, None)
    else:
        made = _Away(storage, _forget)
        made.key, made.tier = storage._cdata, tier
        _AWAY[made.key] = made
    moved(tensor, tier)


def home_of(tensor: Tensor) -> str | None:
    """Where what is made of a tensor lives, if that is not the device."""
    return "cpu" if storage_of(tensor) in _AWAY else None


def _forget(away: Any) -> None:
    key: int = away.key
    if _AWAY.get(key) is away:
        del _AWAY[key]


def _common_tier(args: Any, kwargs: Any) -> str | None:
    """Host memory, if all tensors among the arguments of an operation live off the device."""
    keys = [storage_of(tensor) for tensor in _tensors((args, kwargs))]
    return "cpu" if keys and all(key in _AWAY for key in keys) else None


class _Books(threading.local):
    closed = 0


_BOOKS = _Books()


@contextlib.contextmanager
def off_the_books() -> Iterator[None]:
    """While active, no ledger looks at what this thread does: for tensors of which `moved` tells afterwards."""
    _BOOKS.closed += 1
    try:
        yield
    finally:
        _BOOKS.closed -= 1


@functools.wraps(_resize)
def _resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
    before = storage.nbytes()
    result = _resize(storage, size)
    records = [(ledger, record) for ledger in _ACTIVE if (record := ledger.live.get(storage._cdata)) is not None]
    for ledger, record in records:
        ledger._resize(record, storage.nbytes())
    try:
        for ledger, _ in records:
            ledger.check()
    except BaseException:
        _resize(storage, before)
        for ledger, record in records:
            ledger._resize(record, before)
        raise
    return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (list, tuple, dict)):
                yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""The methods that give the tensors which a sparse one is made of, by layout."""


def parts_of(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that hold a tensor's data: itself, or the inner ones of a wrapper subclass or a sparse layout."""
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in parts_of(getattr(tensor, name))]
    if tensor.layout in PARTS:
        return [getattr(tensor, name)() for name in PARTS[tensor.layout]]
    return (tensor,)


def _holders(tensor: Tensor) -> tuple[int, int]:
    """References to a tensor and to its storage, Python's and C++'s together."""
    storage = tensor.untyped_storage()._cdata
    return tensor._use_count(), torch._C._storage_Use_Count(storage)  # type: ignore[attr-defined]


class _Counting(TorchDispatchMode):
    """Sees how many holders the engine's own sum of gradients has, in a graph where it is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and torch._C._current_graph_task_id() != -1:
            self.seen = self._count(args)
        return func(*args, **(kwargs or {}))

    def _count(self, args: Any) -> tuple[int, int]:
        # As deep and with as many names as in Ledger._taken_over: Python's references count too.
        old, _ = args[:2]
        return _holders(old)


_LOCK = threading.Lock()
_SOLE: list[tuple[int, int] | None] = []


def sole_holders() -> tuple[int, int] | None:
    """What ``_holders`` says inside a mode of a tensor that only the engine holds; differs between torch versions."""
    with _LOCK:
        if not _SOLE:
            from torch.utils._python_dispatch import _disable_current_modes

            with _disable_current_modes(), torch.enable_grad(), _Counting() as counting:
                x = torch.zeros(2, requires_grad=True) * 1
                torch.autograd.grad((x.sin() + x.cos()).sum(), x)
            _SOLE.append(counting.seen)
        return _SOLE[0]
