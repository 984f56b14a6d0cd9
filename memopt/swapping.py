"""Weights that live off the device and come when their block is used: the engine of `passes/block_swap.py`.

A *unit* is a module whose weights come and go together. Away, each parameter's data is its home (`homes.py`), so that
`state_dict`, optimizers and everybody else find the values at any time. To bring a unit in is to make copies on the
device and let the same parameters have these as their data; to let it go is to give them their homes again.

What autograd saves of a weight, often a view such as its transpose, would keep the copy alive until backward. Hooks
keep a note in its place, and backward brings the unit in again. All other tensors go on to whatever hooks there are.

The order in which units are used is learned, for forward and for backward: as long as a run follows the last one's, the
next units are fetched ahead; the first backward is expected to be the forward reversed. No result depends on it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memopt.homes import Arrival, Reader, Weight, find_homes
from memopt.saved import Passed, Stays, check_version, hooks_allowed, hooks_in_force
from memopt.tensors import storage_of, version_of
from memopt.transfer import Mover

Phase = Literal["forward", "backward"]


class Unit:
    """Weights that come and go together."""

    swapper: Swapper

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        self.running = 0
        """Calls of the module that have begun and not ended."""
        self.held = False
        """Read from outside, by somebody who may use what he has read until the model's forward is over."""
        self.loaded = False
        self._coming: list[Arrival] | None = None

    @property
    def bytes(self) -> int:
        """On the device, while it is there."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def coming(self) -> bool:
        """Whether it was fetched and has not been used."""
        return self._coming is not None

    def fetch(self) -> None:
        """Begin to bring the weights in."""
        if not self.loaded and self._coming is None:
            self._coming = []
            for weight in self.weights:
                self._coming.append(weight.begin())

    def arrive(self) -> None:
        """Bring the weights in and use them."""
        try:
            self.fetch()
            coming, self._coming = self._coming or [], None
            nears = [wait() for wait in coming]
            self.loaded = True
            for weight, near in zip(self.weights, nears, strict=True):
                weight.come(near)
        except BaseException:
            self.go()
            raise

    def go(self) -> None:
        """Let the weights go, also those on their way."""
        coming, self._coming = self._coming or [], None
        for wait in coming:
            with contextlib.suppress(Exception):  # nobody wants them
                wait()
        self.loaded = self.held = False
        for weight in self.weights:
            weight.go()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model makes its own when it is called."""
        return None


class Swapper:
    """Brings the units of one model in and lets them go.

    Args:
        units: lists of weights.
        mover: for host memory and streams; its tier is where the weights live.
        folder: for files.
        resident: how many units stay, the one in use among them.
        prefetch: how many of the next are fetched ahead.
        counts: gets the numbers of what was done.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        mover: Mover,
        folder: str | Path | None,
        resident: int,
        prefetch: int,
        counts: Counter[str],
    ) -> None:
        self.units, self.mover, self.counts = list(units), mover, counts
        self.resident, self.prefetch = resident, prefetch
        self._folder, self._reader = folder, Reader()
        self._lock = threading.RLock()
        self._depth = 0  # calls of the model or of units that have begun and not ended
        self._loaded: list[Unit] = []  # the last used last
        self._learned: dict[Phase, list[Unit]] = {"forward": [], "backward": []}
        self._order: dict[Phase, list[Unit]] = {"forward": [], "backward": []}
        self._follows: dict[Phase, bool] = {"forward": True, "backward": True}
        self._tasks: set[int] = set()  # of autograd, at whose end the units go
        self._near: dict[int, tuple[Unit, Weight]] = {}  # by storage

    def settle(self) -> None:
        """Find homes for the weights that have none, or have got other data since."""
        strays = [weight for unit in self.units for weight in unit.weights if weight.strayed]
        if strays:
            find_homes(strays, self.mover, self._folder, self._reader)

    def remove(self) -> None:
        """Put all weights back on the device for good."""
        with self._lock:
            self._let_all_go()
            for unit in self.units:
                for weight in unit.weights:
                    weight.stay()
            self._reader.close()
            self.units = []

    # --- forward and backward ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self, unit: Unit | None = None) -> Iterator[None]:
        """Around a call of the model, or of one unit's module, whose weights are there meanwhile."""
        with self._lock:
            if self._depth == 0 and _phase() == "forward":
                self._tasks.clear()  # of a backward that failed
                self._let_all_go()
                self.settle()
            self._depth += 1
            if unit is not None:
                unit.running += 1
        try:
            if unit is not None:
                self.use(unit)
            with self._hooks(), _without_cast_weights():
                yield
        finally:
            with self._lock:
                self._depth -= 1
                if unit is not None:
                    unit.running -= 1
                if self._depth == 0 and _phase() == "forward":
                    self._end("forward")

    def read(self, unit: Unit) -> None:
        """Somebody looks at a weight."""
        if unit.running:
            return
        if _phase() == "backward":
            self.use(unit)
        elif self._depth:
            self.use(unit)
            if not unit.held:
                unit.held = True
                self.counts["blocks kept because others read their weights"] += 1

    def use(self, unit: Unit) -> None:
        """Have a unit's weights on the device, and the next ones on their way."""
        with self._lock:
            if unit.loaded and self._loaded[-1] is unit:
                return
            phase = _phase()
            if phase == "backward":
                self._until_backward_ends()
            expected = self._note(unit, phase)
            for other in self.units:
                if other.coming and other is not unit and other not in expected:
                    other.go()
            if unit.loaded:
                self._loaded.remove(unit)
            else:
                self._make_room()
                unit.arrive()
                self.counts["blocks brought in"] += 1
                self.counts["bytes brought in"] += unit.bytes
                self._near.update({storage_of(w.near): (unit, w) for w in unit.weights if w.near is not None})
            self._loaded.append(unit)
            for other in expected:
                other.fetch()

    def _note(self, unit: Unit, phase: Phase) -> list[Unit]:
        """Remember that a unit is used; which are expected next."""
        order, learned = self._order[phase], self._learned[phase]
        self._follows[phase] &= len(order) < len(learned) and learned[len(order)] is unit
        order.append(unit)
        expected: list[Unit] = []
        for other in learned[len(order) :] if self._follows[phase] else []:
            if len(expected) == self.prefetch:
                break
            if other is not unit and not other.loaded and other not in expected:
                expected.append(other)
        return expected

    def _make_room(self) -> None:
        free = [unit for unit in self._loaded if not unit.running and not unit.held]
        for unit in free[: max(0, len(self._loaded) - self.resident + 1)]:
            self._let_go(unit)

    def _let_go(self, unit: Unit) -> None:
        if unit in self._loaded:
            self._loaded.remove(unit)
        for weight in unit.weights:
            if weight.near is not None:
                self._near.pop(storage_of(weight.near), None)
        unit.go()

    def _let_all_go(self) -> None:
        for unit in self.units:
            if (unit.loaded or unit.coming) and not unit.running:
                self._let_go(unit)

    def _end(self, phase: Phase) -> None:
        self._let_all_go()
        if self._order[phase]:
            self._learned[phase] = self._order[phase]
            if phase == "forward" and not self._learned["backward"]:
                self._learned["backward"] = self._order[phase][::-1]
        self._order[phase], self._follows[phase] = [], True

    def _until_backward_ends(self) -> None:
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        if not self._tasks:
            self._order["backward"], self._follows["backward"] = [], True
        self._tasks.add(task)

        def ended() -> None:
            with self._lock:
                self._tasks.discard(task)
                self._end("backward")

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(ended)

    # --- what autograd saves -------------------------------------------------------------------------------------

    def _hooks(self) -> contextlib.AbstractContextManager[Any]:
        if not torch.is_grad_enabled() or not hooks_allowed():
            return contextlib.nullcontext()
        outer = hooks_in_force()
        if outer is not None and getattr(getattr(outer[0], "__self__", None), "swapper", None) is self:
            return contextlib.nullcontext()
        return saved_tensors_hooks(_Packer(self, outer).pack, _unpack)

    def note_of(self, tensor: Tensor) -> Any:
        """What stands for a view of a weight until backward; None for any other tensor."""
        found = self._near.get(storage_of(tensor))
        if found is None or found[1].near is None or tensor.dtype != found[1].near.dtype:
            return None
        return _Noted(self, *found, tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model makes its own when it is called."""
        return None


class _Packer:
    def __init__(self, swapper: Swapper, outer: Any) -> None:
        self.swapper, self.outer = swapper, outer

    def pack(self, tensor: Tensor) -> Any:
        noted = self.swapper.note_of(tensor)
        if noted is not None:
            return noted
        return Passed(self.outer, tensor) if self.outer is not None else Stays(tensor)


def _unpack(packed: Any) -> Tensor:
    tensor: Tensor = packed.tensor()
    return tensor


class _Noted:
    """What autograd keeps in place of a view of a weight."""

    def __init__(self, swapper: Swapper, unit: Unit, weight: Weight, tensor: Tensor) -> None:
        self.swapper, self.unit, self.weight = swapper, unit, weight
        self.size, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.version = version_of(weight.parameter)

    def tensor(self) -> Tensor:
        """The view, of the weight that is brought in for it."""
        check_version(self.weight.parameter, self.version)
        if self.unit in self.swapper.units:  # otherwise the pass was taken off since
            self.swapper.use(self.unit)
        near = self.weight.near
        with torch.no_grad():
            data = self.weight.parameter.detach() if near is None else near
            return data.as_strided(self.size, self.stride, self.offset)


def _phase() -> Phase:
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


@contextlib.contextmanager
def _without_cast_weights() -> Iterator[None]:
    """Without gradients, autocast need not keep what it casts weights to: that would be all of them in the end."""
    if torch.is_grad_enabled() or not torch.is_autocast_cache_enabled():
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)
