"""What one forward saved, and what of it is away: shared by the passes that move activations.

Saved-tensor hooks around forward hand every tensor that autograd saves to a :class:`Tape`. A storage that several
operations save, as several views, moves once (:class:`Away`); parameters, buffers and what the caller gave the model
stay. Backward uses what was saved last first, so with each tensor that it asks for the next ones before it set out.

A tensor that stays may still leave later in forward (:meth:`Tape.park`): what autograd holds is an object that can be
told so.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memopt.saved import Pack, Passed, Stays, Unpack, kept_by, owner_in_force
from memopt.tensors import is_memory, span, version_of
from memopt.transfer import Mover, Parked


class Tape:
    """What one forward saved, in order.

    Args:
        mover: moves what leaves.
        held: storages that stay.
        least: bytes; smaller storages stay. None: all stay that are not parked.
        prefetch: how many storages set out before they are asked for.
        counts: gets the numbers of what was moved.
        outer: hooks further out, which get what stays; None: it is kept here.
    """

    def __init__(
        self,
        mover: Mover,
        held: set[int],
        least: int | None,
        prefetch: int,
        counts: Counter[str],
        outer: tuple[Pack, Unpack] | None = None,
    ) -> None:
        self.outer = outer
        self.mover, self.held, self.least, self.prefetch, self.counts = mover, held, least, prefetch, counts
        self.order: list[weakref.ref[Away]] = []
        self.lock = threading.RLock()
        """Autograd has a thread for each device, and users may have more."""
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[Away]]] = {}
        self._kept: dict[int, list[weakref.ref[Kept]]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """What stands for a tensor until backward: a view of what is away, or itself."""
        place = self._place(tensor)
        if place is None:
            return self._stays(tensor)
        away = self._away(tensor, place)
        if away is None and self.least is not None and (place[1] - place[0]) * tensor.itemsize >= self.least:
            away = self._move(tensor, place)
        if away is not None:
            return Saved(away, tensor, place[0])
        if self.outer is not None:
            return Passed(self.outer, tensor)
        kept = Kept(tensor)
        self._kept.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(kept))
        return kept

    def park(self, tensor: Tensor) -> Away | None:
        """Move a tensor's storage out, and have autograd let go of it; None if it has to stay."""
        place = self._place(tensor)
        if place is None:
            return None
        with self.lock:
            away = self._away(tensor, place) or self._move(tensor, place)
            for ref in self._kept.pop(tensor.untyped_storage()._cdata, ()):
                kept = ref()
                if kept is not None:
                    kept.leave(self)
            return away

    def _stays(self, tensor: Tensor) -> Any:
        return kept_by(tensor, self.outer)

    def keeps(self, tensor: Tensor) -> int:
        """How many objects of autograd's keep a tensor's memory that would let go of it."""
        kept = self._kept.get(tensor.untyped_storage()._cdata, ())
        return sum(1 for ref in kept if (one := ref()) is not None and one.stays)

    def adopt(self, tensor: Tensor, away: Away) -> None:
        """Remember that a tensor holds what is away, as it came back."""
        place = self._place(tensor)
        if place is not None:
            self._remember(tensor, place, away)

    def _place(self, tensor: Tensor) -> tuple[int, int] | None:
        """Which elements of its storage would move with a tensor; None if it has to stay."""
        if not is_memory(tensor):
            return None
        storage = tensor.untyped_storage()
        size, (start, stop) = tensor.itemsize, span(tensor)
        if storage._cdata in self.held or storage.nbytes() % size:
            return None
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        whole = self.mover.compress not in ("fp8", "int8")  # what nobody saved shall not share a scale with it
        # Where it was written to, other parts may be written to yet and have counts of their own (unsafe_chunk; RNNs).
        whole = whole and version_of(tensor) <= 0
        if whole and 2 * (stop - start) * size >= storage.nbytes():
            return 0, storage.nbytes() // size
        return start, stop

    def _key(self, tensor: Tensor, place: tuple[int, int]) -> tuple[Any, ...]:
        return tensor.untyped_storage()._cdata, tensor.dtype, *place, version_of(tensor)

    def _away(self, tensor: Tensor, place: tuple[int, int]) -> Away | None:
        known = None if tensor.is_inference() else self._known.get(self._key(tensor, place))
        return known[1]() if known is not None and not known[0].expired() else None

    def _move(self, tensor: Tensor, place: tuple[int, int]) -> Away:
        start, stop = place
        away = Away(self, tensor.detach().as_strided((stop - start,), (1,), start), start)
        self._remember(tensor, place, away)
        return away

    def _remember(self, tensor: Tensor, place: tuple[int, int], away: Away) -> None:
        self._known[self._key(tensor, place)] = StorageWeakRef(tensor.untyped_storage()), weakref.ref(away)


def tape_in_force() -> Tape | None:
    """The innermost tape that gets what autograd saves here."""
    return owner_in_force(Tape)


class Kept(Stays):
    """A tensor that stays for now."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._saved: Saved | None = None

    @property
    def stays(self) -> bool:
        """Whether it still keeps the tensor."""
        return self._saved is None

    def leave(self, tape: Tape) -> None:
        """Keep what is away in its place."""
        place = tape._place(self.kept)
        if place is not None and version_of(self.kept) == self.version:
            away = tape._away(self.kept, place)
            if away is not None:
                self._saved = Saved(away, self.kept, place[0])
                del self.kept

    def tensor(self) -> Tensor:
        return self._saved.tensor() if self._saved is not None else super().tensor()


class Away:
    """A storage, or a part of one, that is away."""

    def __init__(self, tape: Tape, flat: Tensor, start: int) -> None:
        self.start = start
        """The element of the storage with which it begins."""
        with torch.no_grad():
            self.parked: Parked = tape.mover.out(flat)
        tape.counts["storages moved out"] += 1
        tape.counts["bytes moved out"] += flat.nbytes
        self.tape, self.index = tape, len(tape.order)
        tape.order.append(weakref.ref(self))
        self.near: Tensor | None = None
        self.waiting: weakref.WeakSet[Saved] = weakref.WeakSet()
        """The views of it that backward has yet to ask for."""
        self.asked: weakref.WeakSet[Saved] = weakref.WeakSet()

    def get(self, view: Saved) -> Tensor:
        """The storage's content on the device. It stays for as long as another view of it will be asked for."""
        if self.near is None:
            self.near = self.parked.get()
        flat = self.near
        self.parked.share(flat)
        ahead, index = 0, self.index
        while index and ahead < self.tape.prefetch:
            index -= 1
            other = self.tape.order[index]()
            if other is not None:
                ahead += 1
                if other.near is None:
                    other.parked.fetch()
        self.waiting.discard(view)
        self.asked.add(view)
        if not self.waiting:  # the next backward through a retained graph begins anew
            self.near = None
            self.waiting, self.asked = self.asked, self.waiting
        return flat


class Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, away: Away, tensor: Tensor, start: int) -> None:
        self.away = away
        self.size, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset() - start
        away.waiting.add(self)

    def tensor(self) -> Tensor:
        """The tensor that autograd saved."""
        with torch.no_grad(), self.away.tape.lock:
            return self.away.get(self).as_strided(self.size, self.stride, self.offset)
