"""Which tensors stay: a census of all live ones, and a watch that compares censuses and says what keeps growing.

A census reads ``gc.get_objects()``; each storage counts once, whatever shares it, under the largest tensor on it. Two
things cannot be found that way. Tensors that only an autograd graph holds have no Python object: the graphs of live
tensors are walked, and the nodes' raw saved tensors read, never ``_saved_*`` itself, which would call unpack hooks (a
checkpoint's recomputes). Where hooks are registered, what they packed is Python's and found without them. Where torch
does not say whether there are hooks, or ``backward`` has freed what was saved, the graph's nodes remain, which count as
a kind of their own: a kept loss grows by them alone. On CUDA, what is allocated beyond the tensors found is a kind too.

The watch needs two censuses to name what grew, so it takes them from the start. They see what the allocator's counter
does not, tensors on the host beside a GPU, and cost is limited: a few at any cost, then ``SHARE`` of the time. It warns
only of growth that is a new high at every one of ``CHECKS`` checks in a row, is about as fast at all of them (caches
that fill up slow down), and outlasts ``gc.collect()`` (reference cycles are no leak).
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from memopt.memory.ledger import PARTS
from memopt.units import format_bytes

SAVED, NODES, UNSEEN = "saved for backward", "autograd graph nodes", "CUDA memory outside of Python's tensors"
NODE_BYTES = 600
"""What a node of a graph takes on the host, about (measured: 26 nodes of a small network after backward)."""

CHECKS = 5
"""Growth at so many checks in a row is a leak ..."""
MIN_GROWTH = 1 << 20
"""... if it is at least this many bytes in all,"""
MIN_RISE = 16 << 10
"""at least this many between two checks,"""
EVEN = 0.25
"""and, per step, at no check less than this part of the mean."""
FREE = 12
"""Censuses that are taken whatever they cost; a leak from the start shows in short runs."""
SHARE = 0.01
"""Part of the time that censuses may take otherwise."""
_HISTORY = 50
_raw_names: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


class Kind(NamedTuple):
    """What tensors have in common; also nodes of graphs, and memory that no tensor accounts for."""

    type: str
    """The Python class, ``SAVED``, ``NODES`` or ``UNSEEN``."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    device: str = ""
    grad_fn: str = ""
    """The operation whose graph the tensor keeps alive."""

    @property
    def graph(self) -> bool:
        """Held by autograd."""
        return self.type in (SAVED, NODES)

    def describe(self, more_shapes: int = 0) -> str:
        """``Tensor float32 [8, 16] on cpu``."""
        parts = [self.type]
        if self.dtype:
            shapes = f" and {more_shapes} other shape{'s' * (more_shapes > 1)}" if more_shapes else ""
            parts.append(f"{self.dtype} {list(self.shape)}{shapes}")
        if self.grad_fn:
            parts.append(f"with the graph of {self.grad_fn}")
        return " ".join(parts) + (f" on {self.device}" if self.device else "")


class Tally(NamedTuple):
    """How many, and their bytes."""

    number: int
    bytes: int


@dataclass(frozen=True)
class Census:
    """What was alive. It holds numbers and names, no tensors."""

    kinds: dict[Kind, Tally]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(tally.bytes for tally in self.kinds.values())

    def since(self, before: Census) -> dict[Kind, Tally]:
        """How much more there is of each kind than before; what did not change is left out."""
        changes = {}
        for kind in self.kinds.keys() | before.kinds.keys():
            new, old = self.kinds.get(kind, Tally(0, 0)), before.kinds.get(kind, Tally(0, 0))
            if new != old:
                changes[kind] = Tally(new.number - old.number, new.bytes - old.bytes)
        return changes


class _Entry(NamedTuple):
    rank: tuple[int, bool, int]
    kind: Kind
    bytes: int


def census() -> Census:
    """Count what is alive in this process: real tensors, and what graphs of them keep."""
    classes = {id(c) for c in _tensor_classes()}  # type(x) is not what x.__class__ claims, and asking it runs no code
    with torch.no_grad(), torch._C.DisableTorchFunction():
        tensors: list[Tensor] = [x for x in gc.get_objects() if id(type(x)) in classes]
        graph, names = _walk(tensors)
        # Weights go by their own name also where a graph saves them, other tensors by the graph's.
        entries = _entries((t for t in tensors if t.requires_grad and t.is_leaf), {})
        entries = _entries(tensors, names) | _entries(graph.saved, {}, SAVED) | entries
    counts: Counter[Kind] = Counter()
    sizes: Counter[Kind] = Counter()
    for entry in entries.values():
        counts[entry.kind] += 1
        sizes[entry.kind] += entry.bytes
    kinds = {kind: Tally(counts[kind], sizes[kind]) for kind in counts}
    if graph.nodes:
        kinds[Kind(NODES)] = Tally(graph.nodes, graph.nodes * NODE_BYTES)
    kinds.update(_unseen(entries.values()))
    return Census(kinds)


def _tensor_classes() -> set[type]:
    found: set[type] = set()
    todo: list[type] = [Tensor]
    while todo:
        cls = todo.pop()
        if cls not in found:
            found.add(cls)
            todo.extend(type.__subclasses__(cls))
    return found


def _entries(tensors: Iterable[Tensor], names: dict[int, str], label: str = "") -> dict[Any, _Entry]:
    """The storages of these tensors, each under the largest tensor on it."""
    entries: dict[Any, _Entry] = {}
    for tensor in tensors:
        try:
            parts = _storages(tensor)
            if not parts:
                continue
            try:
                shape = tuple(tensor.shape)
            except RuntimeError:  # nested tensors have none
                shape = ()
            # Of several on one storage the same one gives the name every time, in whatever order they are met.
            rank, kind = (tensor.numel(), type(tensor) is not Tensor, tensor.dim()), None
            for key, nbytes in parts:
                old = entries.get(key)
                if old is not None and old.rank >= rank:
                    continue
                kind = kind or Kind(
                    label or type(tensor).__name__,
                    str(tensor.dtype).removeprefix("torch."),
                    shape,
                    str(tensor.device),
                    names.get(id(tensor), ""),
                )
                entries[key] = _Entry(rank, kind, nbytes)
        except Exception:  # a tensor of a kind that answers no questions
            continue
    return entries


def _storages(tensor: Tensor) -> list[tuple[Any, int]]:
    """(key, bytes) of what a tensor keeps; nothing for fake and meta tensors, and for wrappers of other tensors."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        return []
    parts: Iterable[Tensor] = (tensor,)
    if tensor.layout in PARTS:
        parts = [getattr(tensor, name)() for name in PARTS[tensor.layout]]
    elif tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return [(id(tensor), tensor.numel() * tensor.element_size())]
    found = []
    for part in parts:
        storage = part.untyped_storage()
        # A fake tensor's storage is on meta, whatever the tensor says; a wrapper's refuses data_ptr.
        if storage.device.type != "meta" and (nbytes := storage.nbytes()) and (address := storage.data_ptr()):
            found.append(((address, storage.device), nbytes))
    return found


@dataclass(frozen=True)
class _Graph:
    nodes: int
    saved: list[Tensor]


def _walk(tensors: list[Tensor]) -> tuple[_Graph, dict[int, str]]:
    """All graphs of these tensors, and the name of each tensor's own node by the tensor's id."""
    names: dict[int, str] = {}
    seen: set[Any] = set()  # also keeps the nodes' Python objects, so that each is met as the same one
    todo: list[Any] = []
    saved: list[Tensor] = []
    for tensor in tensors:
        try:
            node = tensor.grad_fn if tensor.requires_grad else None
        except Exception:  # a view that was changed in a way that autograd forbids
            continue
        if node is not None:
            names[id(tensor)] = type(node).__name__
            todo.append(node)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        saved.extend(_saved(node))
        todo.extend(following for following, _ in node.next_functions if following is not None)
    return _Graph(len(seen), saved), names


def _saved(node: Any) -> list[Tensor]:
    """What a node saved, without calling hooks; nothing where ``backward`` has freed it."""
    cls = type(node)
    if cls not in _raw_names:
        _raw_names[cls] = tuple(name for name in dir(cls) if name.startswith("_raw_saved"))
    found = []
    for name in _raw_names[cls]:
        try:
            value = getattr(node, name)
            for raw in value if isinstance(value, tuple) else (value,):
                if raw.unpack_hook is None and (data := raw.data) is not None:
                    found.append(data)
        except Exception:  # freed; or a torch that does not know unpack_hook
            continue
    return found


def _unseen(entries: Iterable[_Entry]) -> dict[Kind, Tally]:
    if not torch.cuda.is_initialized():
        return {}
    seen: Counter[str] = Counter()
    for entry in entries:
        seen[entry.kind.device] += -(-entry.bytes // 512) * 512  # as the allocator rounds
    rest = {}
    for index in range(torch.cuda.device_count()):
        nbytes = torch.cuda.memory_allocated(index) - seen[f"cuda:{index}"]
        if nbytes > 0:
            rest[Kind(UNSEEN, device=f"cuda:{index}")] = Tally(0, nbytes)
    return rest


class _Observation(NamedTuple):
    step: int
    census: Census
    bytes: int


class _Cycle:
    itself: _Cycle


class LeakWatch:
    """Compares what is alive after steps. ``check`` answers with a warning when it keeps growing.

    Args:
        share: part of the time that censuses may take; ``math.inf`` takes one at every check.
        free: how many are taken before that limit holds.
        clock: seconds.
    """

    def __init__(
        self, *, share: float = SHARE, free: int = FREE, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.free, self.clock = share, free, clock
        self.taken = 0
        """Censuses so far."""
        self.seconds = 0.0
        """What they took."""
        self._cost = 0.0  # of the last one
        self._begun = clock()
        self._high = 0
        self._run: list[_Observation] = []  # of unbroken growth
        self._first: Census | None = None
        self._reported: dict[Kind, int] = {}

    def check(self, step: int) -> str | None:
        """Look, if the cost allows it; the text of a warning, or None. Call it after a step, its values released."""
        if self.taken >= self.free and self.seconds + self._cost > self.share * (self.clock() - self._begun):
            return None
        now = self._observe(step)
        if self._first is None:
            self._first = now.census
        if now.bytes < self._high + MIN_RISE or not self._run:
            self._high = max(self._high, now.bytes)
            self._run = [now]
            return None
        self._run = [*self._run[-_HISTORY:], now]
        start = self._suspicious()
        news = start and self._news(start, now)
        if start is None or not news:
            self._high = now.bytes
            return None
        self._high = now.bytes
        if not self._collect():  # asked again at the next check
            return None
        now = self._observe(step)
        self._high = now.bytes
        if now.bytes < self._run[-2].bytes + MIN_RISE:  # it was garbage
            self._run = [now]
            return None
        self._run[-1] = now
        news = self._news(start, now)
        self._reported.update(news)
        return _text(start, now) if news else None

    def _collect(self) -> bool:
        """Free reference cycles; False when Python did not, as while another thread is at it."""
        begin = self.clock()
        cycle = _Cycle()
        cycle.itself = cycle
        alive = ref(cycle)
        del cycle
        gc.collect()
        self.seconds += self.clock() - begin
        return alive() is None

    def _observe(self, step: int) -> _Observation:
        begin = self.clock()
        taken = census()
        self._cost = self.clock() - begin
        self.seconds += self._cost
        self.taken += 1
        return _Observation(step, taken, taken.bytes)

    def _suspicious(self) -> _Observation | None:
        """Where a growth that looks like a leak began, lately."""
        last = self._run[-CHECKS - 1 :]
        rates = [(b.bytes - a.bytes) / max(1, b.step - a.step) for a, b in itertools.pairwise(last)]
        if len(rates) < CHECKS or min(rates) < EVEN * sum(rates) / CHECKS:
            return None
        enough = self._run[-1].bytes - MIN_GROWTH
        return next((o for o in reversed(self._run[:-CHECKS]) if o.bytes <= enough), None)

    def _news(self, start: _Observation, now: _Observation) -> dict[Kind, int]:
        """The causes not reported yet, or at half of what they have grown to since the run began."""
        assert self._first is not None
        news = {}
        total = _growth(now.census.since(self._first))
        for cause, lately in _causes(start.census, now.census):
            grown = max(lately.bytes, total[cause].bytes if cause in total else 0)
            if grown >= 2 * self._reported.get(cause, 0):
                news[cause] = grown
        return news


def _growth(changes: dict[Kind, Tally]) -> dict[Kind, Tally]:
    """Changes without regard to shapes: batches of different lengths leak tensors of different shapes."""
    sums: dict[Kind, Tally] = {}
    for kind, change in changes.items():
        cause = kind._replace(shape=())
        old = sums.get(cause, Tally(0, 0))
        sums[cause] = Tally(old.number + change.number, old.bytes + change.bytes)
    return sums


def _causes(before: Census, now: Census) -> list[tuple[Kind, Tally]]:
    """The most that grew, without shapes: up to three, each at least a tenth of it all."""
    total = now.bytes - before.bytes
    ranked = sorted(_growth(now.since(before)).items(), key=lambda item: -item[1].bytes)
    return [(kind, grown) for kind, grown in ranked[:3] if grown.bytes >= total / 10]


def _text(start: _Observation, now: _Observation) -> str:
    steps = max(1, now.step - start.step)
    changes = now.census.since(start.census)
    causes = _causes(start.census, now.census)
    named = []
    for cause, grown in causes:  # shapes that hardly grew are left out
        shapes = [k for k, c in changes.items() if k._replace(shape=()) == cause and c.bytes > grown.bytes / 100]
        largest = max(shapes, key=lambda k: changes[k].bytes)
        number, nbytes = (sum(column) for column in zip(*(changes[k] for k in shapes), strict=True))
        named.append(f"{largest.describe(len(shapes) - 1)} ({number:+,}, {format_bytes(nbytes)})")
    text = (
        f"live tensor memory keeps growing: +{format_bytes((now.bytes - start.bytes) // steps)} per step over the last "
        f"{steps:,} steps, to {format_bytes(now.bytes)}. Growing: {'; '.join(named)}."
    )
    if not any(cause.graph for cause, _ in causes):
        return f"{text} Look for a list, a dictionary or a cache that keeps one more of them at every step."
    holders = [(change.number, kind) for kind, change in changes.items() if kind.grad_fn and change.number > 0]
    if holders:
        count, kind = max(holders)
        text += f" They are held by {kind.describe()} ({count:+,})."
    return f"{text} A common cause is keeping a loss or an output in a list: keep loss.item() or output.detach()."
