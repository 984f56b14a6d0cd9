"""The tracker: a ledger that also knows what each storage is for, which module made it, and how it went over time.

It writes down events while a step runs and draws conclusions afterwards, because what a storage is often shows later:
a tensor becomes a gradient when autograd stores it in ``.grad``, an optimizer state when the optimizer keeps it.

- *Categories.* Parameters, buffers, gradients and optimizer states are labelled and count as such from their birth.
  Everything else is an activation while something keeps it for backward, otherwise a temporary.
- *Kept for backward* is seen by saved-tensor hooks: what autograd saves is wrapped in a small object whose end says
  that the node has let go. Hooks of others (checkpointing, offloading) keep working; what they hand to autograd, or
  keep in place of it, counts instead. What a custom function puts aside without telling autograd shows at the end of
  forward: it is still alive and belongs to nobody else.
- *Modules.* In forward the stack of running modules is known from global module hooks. In backward the autograd node
  that runs has a sequence number, given in forward, which lies in the range of the module that made it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as optim
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memopt.memory.cost import Cost, cost_of
from memopt.memory.ledger import Ledger, Record, home_of, lives, sole_holders
from memopt.saved import observes

# Kinds of events: a storage has changed its bytes, is kept for backward by one more or fewer, stays kept until it dies,
# or has moved to another tier.
BYTES, KEEP, STICK, TIER = range(4)


class Trace:
    """What the tracker knows of a storage besides its size."""

    __slots__ = ("born", "end", "from_op", "label", "leaf", "used", "user", "waits")

    def __init__(self, born: int) -> None:
        self.born = born
        """Operation that made it; -1 if it was there before."""
        self.label = ""
        """Category that it has from birth; empty for activations and temporaries."""
        self.leaf = -1
        """Calls of leaf modules that had begun when it was last used; -1 before its first use."""
        self.used = born
        """Operation that last used it."""
        self.waits = 0
        """The most calls of leaf modules between two uses in forward."""
        self.from_op = self.end = born
        """The operations on both sides of that wait."""
        self.user = ""
        """The module that used it then."""


class _Kept:
    """A tensor that autograd keeps, while it keeps it."""

    __slots__ = ("records", "tensor", "tracker", "version")

    def __init__(self, tracker: Tracker, records: list[Record], tensor: Tensor, version: int) -> None:
        self.tracker, self.records, self.tensor, self.version = tracker, records, tensor, version

    def __del__(self) -> None:
        for record in self.records:
            self.tracker.event(record, KEEP, -1)


class Tracker(Ledger):
    """Follows one or several steps of a model; ``memopt.memory.timeline`` makes a report of what it saw.

    Args:
        model: the model whose modules are named.
        rounding, device, fakes: as for :class:`Ledger`.
    """

    def __init__(self, model: nn.Module, *, rounding: int = 1, device: str = "cpu", fakes: bool = False) -> None:
        super().__init__(rounding=rounding, device=device, fakes=fakes)
        self.events: list[tuple[int, Record, int, Any]] = []
        self.names: list[str] = []
        """Name of each operation."""
        self.paths: list[str] = []
        """Path of the module each operation ran in."""
        self.costs: list[Cost] = []
        """The work of each operation, if it is weighed."""
        self.weigh = False
        self.transferred = 0
        """Bytes that went to other tiers and came from there."""
        self.phases: list[tuple[str, int, int]] = []
        self.phase_name = ""
        self.forward_ends: list[int] = []
        """For each forward, the events up to its end."""
        self._model = model
        self._path_of = {id(m): path for path, m in model.named_modules()}
        self._stack: list[tuple[int, str]] = []
        self._path = ""
        self._leaves = 0
        self._markers: tuple[list[int], list[str]] = ([0], [""])
        self._closed = False
        self._exit = contextlib.ExitStack()

    # --- what there is -------------------------------------------------------------------------------------------

    def own(self, named: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Label storages, from their birth on, as parameters, buffers, gradients or optimizer states."""
        for name, tensor in named:
            for record in self.see(tensor):
                if record.trace.label != label:
                    record.trace.label = label
                    record.module = name.rpartition(".")[0]

    def own_model(self) -> None:
        """Label what the model holds."""
        for name, parameter in self._model.named_parameters():
            self.own([(name, parameter)], "parameters")
            if parameter.grad is not None:
                self.own([(name, parameter.grad)], "gradients")
        self.own(self._model.named_buffers(), "buffers")

    def own_states(self, optimizer: optim.Optimizer) -> None:
        """Label what an optimizer keeps between its steps."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        for parameter, state in optimizer.state.items():
            if (tier := home_of(parameter)) is not None:  # with which what it makes in its step lives
                for tensor in _leaves(state):
                    if tensor.shape == parameter.shape:
                        lives(tensor, tier)
            name = names.get(id(parameter), "")
            self.own([(name, t) for t in _leaves(state)], "optimizer_states")

    # --- phases --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Operations inside belong to ``forward``, ``backward`` or ``optimizer``."""
        first, before = self.ops, self.phase_name
        self.phase_name = name
        try:
            yield
        finally:
            self.phase_name = before
            self.phases.append((name, first, self.ops))

    def end_forward(self, result: Any = None) -> None:
        """Forward is over: what is alive now and belongs to nobody waits for backward. ``result`` is the caller's."""
        ours = {record.key for tensor in _leaves(result) for record in self.see(tensor)}
        for record in self.live.values():
            trace = record.trace
            if not trace.label and record.phase == "forward" and record.key not in ours:
                self.event(record, STICK, 0)
        self.forward_ends.append(len(self.events))

    # --- the ledger's calls --------------------------------------------------------------------------------------

    def event(self, record: Record, kind: int, value: Any) -> None:
        """Write down that something happened to a storage."""
        if not self._closed:
            self.events.append((self.ops - 1, record, kind, value))

    def born(self, record: Record) -> None:
        fresh = bool(record.op)
        record.trace = Trace(self.ops - 1 if fresh else -1)
        if fresh:
            record.phase = self.phase_name
            record.module = self.paths[-1]
            record.trace.leaf = self._leaves

    def changed(self, record: Record, change: int) -> None:
        self.event(record, BYTES, record.bytes)

    def placed(self, record: Record) -> None:
        self.event(record, TIER, record.tier)

    def labelled(self, record: Record, label: str) -> None:
        record.trace.label = label

    def place(self, tensor: Tensor, tier: str, label: str = "") -> None:
        super().place(tensor, tier, label)
        # Of what is kept only the way out is told, of weights the way back.
        self.transferred += tensor.untyped_storage().nbytes() * (1 if tier == "device" else 2)

    def worked(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self.weigh:
            self.costs[-1] = cost_of(func, args, kwargs, result)

    def begin(self, func: Any) -> None:
        self.costs.append(Cost())  # of one that raises
        self.names.append(func._schema.name.replace("::", "."))
        self.paths.append(self._path if self._stack else self._backward_path())

    def use(self, tensor: Tensor) -> None:
        for record in self.see(tensor):
            if self.phase_name == "forward":
                self._used(record.trace)

    def _used(self, trace: Trace) -> None:
        if trace.leaf >= 0 and self._leaves - trace.leaf > trace.waits:
            trace.waits = self._leaves - trace.leaf
            trace.from_op, trace.end, trace.user = trace.used, self.ops - 1, self._path
        trace.leaf, trace.used = self._leaves, self.ops - 1

    # --- modules -------------------------------------------------------------------------------------------------

    def here(self) -> bool:
        """Whether the tracker is active in this thread; hooks on modules and optimizers are called in all of them."""
        return any(mode is self for mode in _get_current_dispatch_mode_stack())

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not self.here():
            return
        self._path = self._path_of.get(id(module), self._path)
        self._stack.append((id(module), self._path))
        self._mark()
        if not module._modules and self.phase_name == "forward":
            self._leaves += 1
        for name, parameter in module._parameters.items():
            if parameter is not None:  # weights may have been loaded just now
                self.own([(f"{self._path}.{name}", parameter)], "parameters")

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.here():
            return
        while self._stack and self._stack.pop()[0] != id(module):
            pass  # a module that was left by an exception
        self._path = self._stack[-1][1] if self._stack else ""
        self._mark()

    def _mark(self) -> None:
        numbers, paths = self._markers
        numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        paths.append(self._path)

    def _backward_path(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        numbers, paths = self._markers
        if number > numbers[-1] + (1 << 40):  # AccumulateGrad, which has none: the node before it
            return self.paths[-1] if self.paths else ""
        return paths[bisect.bisect_right(numbers, number) - 1]

    # --- kept for backward ---------------------------------------------------------------------------------------

    @observes
    def _pack(self, tensor: Tensor) -> _Kept:
        records = self.see(tensor)
        for record in records:
            self.event(record, KEEP, 1)
        with self.hush():
            return _Kept(self, records, tensor.detach(), tensor._version)  # the tensor itself would be a cycle

    def _unpack(self, kept: _Kept) -> Tensor:
        if kept.tensor._version != kept.version:  # autograd's own check, which hooks switch off
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(kept.tensor.shape)} made in {kept.records[0].module if kept.records else '?'!r} is at version "
                f"{kept.tensor._version}; expected version {kept.version}"
            )
        return kept.tensor

    def packed_by_others(self, pack: Any, tensor: Tensor) -> Any:
        """Pack a tensor with somebody else's hook, and count what it keeps instead."""
        packed = pack(tensor)
        for kept in _leaves(packed):
            for record in self.see(kept):
                if not record.trace.label:
                    self.event(record, STICK, 0)
        return packed

    @contextlib.contextmanager
    def hush(self) -> Iterator[None]:
        """Operations inside are ours and do not count."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    # --- on and off ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        sole_holders()  # runs a small backward when it is first asked
        with contextlib.ExitStack() as stack:
            stack.callback(nn_module.register_module_forward_pre_hook(self._enter_module).remove)
            stack.callback(nn_module.register_module_forward_hook(self._leave_module, always_call=True).remove)
            after = optim.register_optimizer_step_post_hook(lambda o, *_: self.own_states(o) if self.here() else None)
            stack.callback(after.remove)
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad and parameter.is_leaf:
                    stack.callback(self.follow_gradient(name, parameter))
            stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            stack.enter_context(_observed_hooks(self))
            super().__enter__()
            self._exit = stack.pop_all()
        return self

    def follow_gradient(self, name: str, leaf: Tensor) -> Any:
        """Label the ``.grad`` of a leaf tensor once it has one; returns what stops that."""

        def accumulated(tensor: Tensor) -> None:
            if tensor.grad is not None:
                with self.hush():
                    self.own([(name, tensor.grad)], "gradients")

        return leaf.register_post_accumulate_grad_hook(accumulated).remove

    def __exit__(self, *exc: Any) -> Any:
        self._closed = True
        try:
            return super().__exit__(*exc)
        finally:
            self._exit.close()


_enter_hooks = saved_tensors_hooks.__enter__
_OBSERVERS: list[Tracker] = []
_LOCK = threading.Lock()


@functools.wraps(_enter_hooks)
def _enter_observed(hooks: saved_tensors_hooks) -> None:
    tracker = next((tracker for tracker in reversed(_OBSERVERS) if tracker.here()), None)
    if tracker is None:
        _enter_hooks(hooks)
        return
    pack = hooks.pack_hook
    hooks.pack_hook = functools.partial(tracker.packed_by_others, pack)
    try:
        _enter_hooks(hooks)
    finally:
        hooks.pack_hook = pack


@contextlib.contextmanager
def _observed_hooks(tracker: Tracker) -> Iterator[None]:
    """Let the tracker see what saved-tensor hooks that are entered inside keep."""
    with _LOCK:
        _OBSERVERS.append(tracker)
        saved_tensors_hooks.__enter__ = _enter_observed  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _LOCK:
            _OBSERVERS.remove(tracker)
            if not _OBSERVERS:
                saved_tensors_hooks.__enter__ = _enter_hooks  # type: ignore[method-assign]


def _leaves(value: Any) -> Iterator[Tensor]:
    from torch.utils._pytree import tree_leaves

    holds = getattr(value, "holds", None)  # ours say so
    return iter(holds()) if holds is not None else (x for x in tree_leaves(value) if isinstance(x, Tensor))
