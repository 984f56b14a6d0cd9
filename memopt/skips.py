"""Tensors that wait while a model goes deep and comes back: finding them, and moving them out meanwhile.

*Finding.* What waits is known only when a model runs. The first forward is watched (:class:`Learner`): the results of
modules, each use that their caller makes of them (handing one to a module, or to a function of torch), and how many
leaf modules are called between two uses. A result that waits long is a *skip connection*; a plan says after which use.

*Moving.* In later forwards such a result is handed to the caller as a :class:`Skip`, a deferred value (`deferred/`):
whatever Python structure keeps it keeps no memory. After its last early use it moves out, and autograd lets go of its
memory, too (`tape.py`). The next use brings it back; those that the plan expects then set out. A plan that no longer
fits costs copies, not correctness: a skip gives its tensor to whoever asks, from wherever it is.

*Gradients.* The tensor that comes back must belong to the graph of the one that left. A node that left nothing but the
edge (:class:`_Leave`) is made when it moves out, one for its return (:class:`_Return`) when it is used. Both pass the
gradient on as it is. Since they are made after the early uses, backward adds up gradients in the order that it would
without them, so the sums round the same.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from memopt.deferred import Deferred
from memopt.memory.ledger import off_the_books
from memopt.tape import Away, Tape, tape_in_force
from memopt.tensors import PLAIN

_ASKING = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__", "__repr__"}
"""Functions that look at a tensor without its values."""


class Site(NamedTuple):
    """Where a tensor comes from: which tensor in the result of which call of a module."""

    path: str
    call: int
    position: int


@dataclass(frozen=True)
class Plan:
    """What waits in a forward."""

    parks: dict[Site, frozenset[int]] = field(default_factory=dict)
    """After how many uses each skip moves out."""
    returns: tuple[Site, ...] = ()
    """The skips in the order of their returns."""
    consumers: frozenset[str] = frozenset()
    """Modules that are given skips."""

    @property
    def modules(self) -> set[str]:
        """Paths of all modules that make skips or are given some."""
        return {site.path for site in self.parks} | self.consumers


class _Seen:
    """A module's result, as the learner sees it."""

    def __init__(self, site: Site, tensor: Tensor, clock: int) -> None:
        self.site, self.ref = site, weakref.ref(tensor)
        self.uses: list[list[int]] = [[clock, clock]]  # begin and end of each; its birth counts as the first
        self.inside = 0
        self.consumers: set[str] = set()


class Learner(TorchFunctionMode):
    """Watches one forward of a model.

    Args:
        least: bytes; smaller tensors are not looked at.
        waits: calls of leaf modules between two uses that are long.
    """

    def __init__(self, model: nn.Module, least: int, waits: int) -> None:
        super().__init__()
        self._model, self._least, self._waits = model, least, waits
        self._thread = threading.get_ident()
        self._clock = 0
        self._seen: dict[int, _Seen] = {}
        self._all: list[_Seen] = []
        self._calls: Counter[str] = Counter()
        self._frames: list[list[_Seen]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        for path, module in self._model.named_modules():
            if path:
                self._handles.append(module.register_forward_pre_hook(self._begin(path), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._end(path), always_call=True))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> Any:
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*exc)

    def _begin(self, path: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            self._clock += not module._modules
            given = [seen for seen in map(self._known, (*args, *kwargs.values())) if seen is not None]
            for seen in given:
                if not seen.inside:
                    seen.uses.append([self._clock, self._clock])
                    seen.consumers.add(path)
                seen.inside += 1
            self._frames.append(given)

        return begin

    def _end(self, path: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            call, self._calls[path] = self._calls[path], self._calls[path] + 1
            for position, tensor in enumerate(tree_leaves(output)):
                known = self._known(tensor)
                if (known is None or not known.inside) and can_wait(tensor, self._least):
                    seen = _Seen(Site(path, call, position), tensor, self._clock)
                    if known is not None and known.site[:2] == seen.site[:2]:
                        continue  # twice in one result
                    self._seen[id(tensor)] = seen
                    self._all.append(seen)
            for seen in self._frames.pop() if self._frames else ():
                seen.inside -= 1
                seen.uses[-1][1] = self._clock

        return end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _ASKING:
            for value in (*args, *kwargs.values()):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    seen = self._known(item)
                    if seen is not None and not seen.inside:
                        seen.uses.append([self._clock, self._clock])
        return func(*args, **kwargs)

    def _known(self, value: Any) -> _Seen | None:
        seen = self._seen.get(id(value)) if isinstance(value, Tensor) else None
        return seen if seen is not None and seen.ref() is value else None

    def plan(self) -> Plan:
        """What was found."""
        parks: dict[Site, frozenset[int]] = {}
        returns: list[tuple[int, int, Site]] = []
        consumers: set[str] = set()
        for seen in self._all:
            ends = zip(seen.uses, seen.uses[1:], strict=False)
            long = [n for n, (use, later) in enumerate(ends) if later[0] - use[1] >= self._waits]
            if long:
                parks[seen.site] = frozenset(long)
                returns += [(seen.uses[n + 1][0], len(returns), seen.site) for n in long]
                consumers |= seen.consumers
        return Plan(parks, tuple(site for *_, site in sorted(returns)), frozenset(consumers))


def can_wait(tensor: Any, least: int) -> bool:
    """Whether a value is a tensor of so many bytes that a skip may stand for."""
    if not isinstance(tensor, Tensor) or type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return False
    if tensor.device.type == "meta" or (tensor.is_leaf and tensor.requires_grad):
        return False
    return tensor.untyped_storage().nbytes() >= least and tensor.numel() * tensor.itemsize >= least


class Skip(Deferred):
    """Stands for a tensor that may be away."""

    ruled = False
    requires_grad = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor, site: Site, run: Run) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.requires_grad = tensor.requires_grad
        self.call: tuple[Any, ...] = ()
        self.site, self.run = site, run
        self.uses = self.inside = 0
        self.pinned = False
        """Changed in place, or hooked: stays from then on."""
        self.here: Tensor | None = tensor
        self.away: Away | None = None

    def make(self, why: str) -> Tensor:
        """The tensor, for one more use."""
        self.run.tick()
        tensor = self.get()
        self.uses += 1
        if self.uses in self.run.plan.parks[self.site]:
            self.run.due.append(self)
        return tensor

    def mark(self, why: str) -> Tensor:
        self.pinned = True
        return self.make(why)

    def consume(self) -> None:
        """Nothing is computed from it without its being made."""

    def park(self) -> None:
        """Move the tensor out."""
        tensor = self.here
        if tensor is None or self.pinned:
            return
        with torch.no_grad():
            self.away = self.run.tape.park(tensor)
        if self.away is None:
            return
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._anchor = _Leave.apply(tensor) if tensor.requires_grad and torch.is_grad_enabled() else None
        self._tensor = weakref.ref(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._grad = torch.is_grad_enabled()
        self.here = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.here is None and self._tensor() is None and self.away is not None:
            self.away.parked.fetch()

    def get(self) -> Tensor:
        """The tensor, from wherever it is."""
        if self.here is None:
            self.here = self._tensor()  # somebody has kept it
        if self.here is None:
            assert self.away is not None
            with torch.no_grad():
                flat = self._still_there()
                if flat is None:
                    flat = self.away.parked.get()
                    place = self._offset - self.away.start
                else:
                    place = self._offset
                tensor = flat.as_strided(self._size, self._stride, place)
            if self._anchor is not None:
                with torch.set_grad_enabled(self._grad):
                    tensor = _Return.apply(self._anchor, [tensor])
            self._anchor = None
            self.run.tape.adopt(tensor, self.away)
            self.here = tensor
            self.run.returned(self)
        return self.here

    def _still_there(self) -> Tensor | None:
        """The memory that it left, flat, if a view of it keeps that."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        with off_the_books():
            flat = torch.empty(0, dtype=self.dtype, device=self.device)
            return flat.set_(storage, 0, (storage.nbytes() // self.dtype.itemsize,), (1,))


class _Leave(torch.autograd.Function):
    """The graph's edge to a tensor without its memory."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Return(torch.autograd.Function):
    """A tensor at the end of such an edge."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:
        return box.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Run:
    """One forward by a plan.

    Args:
        tape: moves the skips, unless another one gets what autograd saves: then that does.
        least: bytes; smaller tensors stay.
        prefetch: how many skips set out before they are used.
    """

    def __init__(self, plan: Plan, tape: Tape, least: int, prefetch: int) -> None:
        self.plan, self.least, self.prefetch = plan, least, prefetch
        self._tape = tape
        self.due: list[Skip] = []
        """Skips after their last early use."""
        self.frames: list[list[Skip]] = []
        """What each running module was given."""
        self._calls: Counter[str] = Counter()
        self._skips: dict[Site, weakref.ref[Skip]] = {}
        self._next = 0

    def __enter__(self) -> Run:
        _running.runs.append(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _running.runs.pop()

    @functools.cached_property
    def tape(self) -> Tape:
        """What moves the skips."""
        return tape_in_force() or self._tape

    def tick(self) -> None:
        """Move out what is due."""
        due, self.due = self.due, []
        for skip in due:
            if skip.inside:
                self.due.append(skip)
            else:
                skip.park()

    def made(self, path: str, output: Any) -> Any:
        """A module's result, with skips in place of tensors that the plan names; None if there are none."""
        call, self._calls[path] = self._calls[path], self._calls[path] + 1
        leaves, spec = tree_flatten(output)
        skips: dict[int, Skip] = {}
        for position, leaf in enumerate(leaves):
            site = Site(path, call, position)
            if site in self.plan.parks and id(leaf) not in skips and can_wait(leaf, self.least):
                skip = skips[id(leaf)] = Skip(leaf, site, self)
                self._skips[site] = weakref.ref(skip)
                if 0 in self.plan.parks[site]:
                    skip.park()
        if not skips:
            return None
        return tree_unflatten([skips.get(id(leaf), leaf) for leaf in leaves], spec)

    def returned(self, skip: Skip) -> None:
        """Have the next ones set out."""
        returns = self.plan.returns
        if skip.site in returns[self._next :]:
            self._next = returns.index(skip.site, self._next) + 1
        for site in returns[self._next : self._next + self.prefetch]:
            ref = self._skips.get(site)
            other = ref() if ref is not None else None
            if other is not None:
                other.fetch()


class _Running(threading.local):
    def __init__(self) -> None:
        self.runs: list[Run] = []


_running = _Running()


class Hooks:
    """The hooks on a module that makes skips or is given some; a copy of the module has a copy of them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def put(self, module: nn.Module) -> list[Any]:
        """Register them."""
        return [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end, always_call=True),
        ]

    @staticmethod
    def on(module: nn.Module) -> bool:
        """Whether a module has some."""
        return any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in module._forward_hooks.values())

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the module tensors."""
        if torch.compiler.is_compiling() or not _running.runs:
            return None
        run = _running.runs[-1]
        run.tick()
        given = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Skip)}
        run.frames.append(list(given.values()))
        if not given:
            return None
        made = {}
        for key, skip in given.items():
            made[key] = skip.make("a module")
            skip.inside += 1
        args = tuple(made.get(id(value), value) for value in args)
        return args, {name: made.get(id(value), value) for name, value in kwargs.items()}

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take skips of its results."""
        if torch.compiler.is_compiling() or not _running.runs:
            return None
        run = _running.runs[-1]
        for skip in run.frames.pop() if run.frames else ():
            skip.inside -= 1
        hooked = module._backward_hooks or module._backward_pre_hooks  # which want tensors
        found = None if hooked else run.made(self.path, output)
        run.tick()
        return found
