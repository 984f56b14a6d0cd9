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
import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memopt.homes import Arrival, Reader, Weight, find_homes
from memopt.optim import before_steps
from memopt.saved import check_version, hooks_allowed, hooks_in_force, kept_by, unpack
from memopt.tensors import is_memory, storage_of, version_of
from memopt.transfer import Mover

Phase = Literal["forward", "backward"]
Method = TypeVar("Method", bound=Callable[..., Any])


def _uncompiled(method: Method) -> Method:
    """Have torch.compile leave a method alone, without importing the compiler where nobody uses it."""
    disabled = torch._disable_dynamo(method)  # type: ignore[attr-defined]

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else method)(*args, **kwargs)

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def _outside_transforms() -> Iterator[None]:
    """Parameters are given data outside of torch.func's transforms, which would wrap these."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


Spare = dict[tuple[int, torch.dtype], list[Tensor]]
"""Memory of copies that were dropped, by their size and type."""


class Unit:
    """Weights that come and go together."""

    swapper: Swapper

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        self.held = False
        """Read from outside, by somebody who may use what he has read for a while."""
        self.loaded = False
        self._coming: list[Arrival | None] | None = None

    @property
    def bytes(self) -> int:
        """On the device, while it is there."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def coming(self) -> bool:
        """Whether it was fetched and has not been used."""
        return self._coming is not None

    def fetch(self, spare: Spare) -> None:
        """Begin to bring the weights in; what cannot be used of the memory to spare goes before more is taken."""
        if not self.loaded and self._coming is None:
            found = [free.pop() if (free := spare.get(weight.size)) else None for weight in self.weights]
            spare.clear()
            self._coming = [weight.begin(one) for weight, one in zip(self.weights, found, strict=True)]

    def arrive(self, spare: Spare) -> None:
        """Bring the weights in and use them."""
        try:
            self.fetch(spare)
            coming, self._coming = self._coming or [], None
            nears = [wait() if wait is not None else None for wait in coming]
            self.loaded = True
            for weight, near in zip(self.weights, nears, strict=True):
                if near is not None:
                    weight.come(near)
        except BaseException:
            self.go({})
            raise

    def go(self, spare: Spare) -> None:
        """Let the weights go, also those on their way; their memory is to spare."""
        coming, self._coming = self._coming or [], None
        for wait in coming:
            with contextlib.suppress(Exception):  # nobody wants them
                if wait is not None:
                    wait()
        self.loaded = self.held = False
        for weight in self.weights:
            size, free = weight.size, weight.go()
            if free is not None:
                spare.setdefault(size, []).append(free)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model makes its own when it is called."""
        return None


class Swapper:
    """Brings the units of one model in and lets them go.

    Args:
        units: by the paths of their modules.
        mover: for host memory and streams; its tier is where the weights live.
        folder: for files.
        resident: how many units stay, the one in use among them.
        prefetch: how many of the next are fetched ahead.
        counts: gets the numbers of what was done.
    """

    def __init__(
        self,
        units: Mapping[str, Unit],
        mover: Mover,
        folder: str | Path | None,
        resident: int,
        prefetch: int,
        counts: Counter[str],
    ) -> None:
        self.paths, self.units, self.mover, self.counts = dict(units), list(units.values()), mover, counts
        for unit in self.units:
            unit.swapper = self
            for weight in unit.weights:
                weight.arrive = functools.partial(self.use, unit)
        self.resident, self.prefetch = resident, prefetch
        self._folder, self._reader = folder, Reader()
        self._lock = threading.RLock()
        # Calls that have begun and not ended: of what, in which thread.
        self._calls: dict[object, tuple[Unit | None, int]] = {}
        self._spare: Spare = {}
        self._loaded: list[Unit] = []  # the last used last
        self._learned: dict[Phase, list[Unit]] = {"forward": [], "backward": []}
        self._order: dict[Phase, list[Unit]] = {"forward": [], "backward": []}
        self._follows: dict[Phase, bool] = {"forward": True, "backward": True}
        self._tasks: set[int] = set()  # of autograd, at whose end the units go
        self._near: dict[int, tuple[Unit, Weight]] = {}  # by storage
        self._unfollow = before_steps(self, Swapper.step_begins).remove

    def settle(self) -> None:
        """Find homes for the weights that have none, or have got other data since."""
        weights = [weight for unit in self.units for weight in unit.weights]
        self._find_homes([weight for weight in weights if weight.strays])

    def _find_homes(self, strays: list[Weight]) -> None:
        if strays:
            find_homes(strays, self.mover, self._folder, self._reader)

    @_uncompiled
    def remove(self) -> None:
        """Put all weights back on the device they came from, for good."""
        with self._lock:
            self._unfollow()
            self._let_all_go()
            kept = 0
            for weight in [weight for unit in self.units for weight in unit.weights]:
                try:
                    weight.stay()
                except (RuntimeError, MemoryError):  # the journal of what is undone must go on
                    kept += 1
            self._reader.close()
            self.units = []
            if kept:
                warnings.warn(f"{kept} weights stay off the device: there is no room for them", stacklevel=2)

    def step_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer may write to its weights, not all of which are at home: it is stepped in forward or backward."""
        with self._lock:
            near = [w for unit in self.units if unit.loaded or unit.coming for w in unit.weights]
            if near:
                stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
                for weight in near:
                    weight.written |= id(weight.parameter) in stepped

    # --- forward and backward ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self, unit: Unit | None = None) -> Iterator[None]:
        """Around a call of the model, or of one unit's module, whose weights are there meanwhile."""
        token = object()
        try:
            self._begin(token, unit)
            with self._hooks(), _without_cast_weights():
                yield
        finally:
            self._done(token, unit)

    @_uncompiled
    def _begin(self, token: object, unit: Unit | None) -> None:
        with self._lock, _outside_transforms():
            if not self._calls and _phase() == "forward":
                self._tasks.clear()  # of a backward that failed
                self._let_all_go()
                self.settle()
                for file in {weight.home.file for u in self.units for weight in u.weights if weight.home is not None}:
                    if file is not None:
                        file.check()
            self._calls[token] = unit, threading.get_ident()
            if unit is not None:
                self.use(unit)

    @_uncompiled
    def _done(self, token: object, unit: Unit | None) -> None:
        with self._lock, _outside_transforms():
            self._calls.pop(token, None)
            if not self._calls and _phase() == "forward":
                if unit is not None:  # called by itself: that says nothing about the order
                    self._order["forward"] = []
                self._end("forward")

    def _runs(self, unit: Unit, thread: int | None = None) -> bool:
        return any(one is unit and thread in (None, ident) for one, ident in self._calls.values())

    @_uncompiled
    def read(self, unit: Unit) -> None:
        """Somebody looks at a weight."""
        backward = _phase() == "backward"
        with self._lock, _outside_transforms():
            if not backward and not self._calls:
                if self._loaded:  # since a backward that failed
                    self._let_all_go()
            elif not self._runs(unit, threading.get_ident()):
                self.use(unit, hold=True)

    @_uncompiled
    def use(self, unit: Unit, hold: bool = False) -> None:
        """Have a unit's weights on the device, and the next ones on their way.

        Args:
            hold: they stay until the model's forward is over; in backward, until another unit's are used.
        """
        with self._lock, _outside_transforms():
            phase = _phase()
            if hold and not unit.held:
                if phase == "forward":
                    self.counts["blocks kept because others read their weights"] += 1
            elif phase == "backward" and not hold:
                for other in self._loaded:
                    other.held = False
            if not (unit.loaded and self._loaded[-1] is unit):
                self._bring(unit, phase)
            unit.held |= hold

    def _bring(self, unit: Unit, phase: Phase) -> None:
        if phase == "backward":
            self._until_backward_ends()
        expected = self._note(unit, phase)
        for other in self.units:
            if other.coming and other is not unit and other not in expected:
                other.go(self._spare)
        if unit.loaded:
            self._loaded.remove(unit)
        else:
            self._make_room()
            self._find_homes([weight for weight in unit.weights if weight.strays])
            unit.arrive(self._spare)
            self.counts["blocks brought in"] += 1
            self.counts["bytes brought in"] += unit.bytes
            self._near.update({storage_of(w.near): (unit, w) for w in unit.weights if w.near is not None})
        self._loaded.append(unit)
        for other in expected:
            with contextlib.suppress(Exception):  # it will be said when it is used
                other.fetch(self._spare)

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
        free = [unit for unit in self._loaded if not self._runs(unit) and not unit.held]
        for unit in free[: max(0, len(self._loaded) - self.resident + 1)]:
            self._let_go(unit)

    def _let_go(self, unit: Unit) -> None:
        if unit in self._loaded:
            self._loaded.remove(unit)
        for weight in unit.weights:
            if weight.near is not None:
                self._near.pop(storage_of(weight.near), None)
        unit.go(self._spare)

    def _let_all_go(self) -> None:
        for unit in self.units:
            if (unit.loaded or unit.coming) and not self._runs(unit):
                self._let_go(unit)

    def _end(self, phase: Phase) -> None:
        self._let_all_go()
        self._spare.clear()
        for unit in self.units:  # from now on anybody may write to the homes
            for weight in unit.weights:
                if weight.home is not None:
                    weight.home.wait()
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
            with self._lock, _outside_transforms():
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
        return saved_tensors_hooks(_Packer(self, outer).pack, unpack)

    def note_of(self, tensor: Tensor) -> Any:
        """What stands for a view of a weight until backward; None for any other tensor."""
        found = self._near.get(storage_of(tensor))
        if found is None or found[1].near is None or tensor.dtype != found[1].near.dtype or not is_memory(tensor):
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
        return kept_by(tensor, self.outer)


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
