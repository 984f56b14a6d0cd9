"""From the tracker's events to a report: replays them in order and looks at the moments that matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from memopt.memory.ledger import Record
from memopt.memory.report import CATEGORIES, ModuleNode, Skip, TensorInfo, Timeline
from memopt.memory.tracker import BYTES, KEEP, STICK, Tracker


@dataclass
class _State:
    """A storage at one moment of the replay."""

    record: Record
    bytes: int = 0
    kept: int = 0
    stuck: bool = False
    tier: str = "device"

    @property
    def category(self) -> str:
        label: str = self.record.trace.label
        return label or ("activations" if self.kept > 0 or self.stuck else "temporaries")


class Replay:
    """The state of all storages after each event, one after another."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.states: dict[int, _State] = {}
        self.categories = dict.fromkeys(CATEGORIES, 0)
        """Bytes on the device, by category."""
        self.tiers: dict[str, int] = {}
        """Bytes elsewhere."""

    def run(self) -> Iterator[tuple[int, int, bool]]:
        """(event, operation, whether any figure changed) for the start, which is event -1, and after each event.

        What was there before the step counts from the start, although it was first seen when it was first used.
        """
        events = self.tracker.events
        early: dict[int, int] = {}
        for i, (_, record, kind, _value) in enumerate(events):
            if record.trace.born < 0 and kind == BYTES:
                early.setdefault(id(record), i)
        for i in early.values():
            self._apply(*events[i][1:])
        yield -1, -1, True
        first = set(early.values())
        for i, (op, record, kind, value) in enumerate(events):
            yield i, op, i not in first and self._apply(record, kind, value)

    def _apply(self, record: Record, kind: int, value: Any) -> bool:
        state = self.states.get(id(record))
        if state is None:
            state = self.states[id(record)] = _State(record, tier=record.tier)
        before = (state.bytes, state.category, state.tier)
        if kind == BYTES:
            state.bytes = value
        elif kind == KEEP:
            state.kept += value
        elif kind == STICK:
            state.stuck = True
        else:
            state.tier = value
        after = (state.bytes, state.category, state.tier)
        if before == after:
            return False
        for sign, (size, category, tier) in ((-1, before), (1, after)):
            if tier == "device":
                self.categories[category] += sign * size
            else:
                self.tiers[tier] = self.tiers.get(tier, 0) + sign * size
        return True

    def alive(self) -> list[_State]:
        """What is on the device now, as it is now."""
        return [dataclasses.replace(s) for s in self.states.values() if s.bytes and s.tier == "device"]


@dataclass(frozen=True)
class Story:
    """What the replay of a tracker's events shows."""

    timeline: Timeline
    peak: int
    peak_point: int
    peak_op: int
    off_device: dict[str, int]
    largest: tuple[TensorInfo, ...]
    kept: int
    modules: ModuleNode
    skips: tuple[Skip, ...]


def tell(tracker: Tracker, model: nn.Module, *, largest: int = 50, waits: int = 16) -> Story:
    """Replay a tracker's events.

    Args:
        largest: how many of the storages at the peak are described.
        waits: how many calls of leaf modules a tensor must wait between two uses to be a skip connection.
    """
    replay = Replay(tracker)
    ops: list[int] = []
    columns: dict[str, list[int]] = {name: [] for name in CATEGORIES}
    totals: list[int] = []
    off: dict[str, int] = {}
    peak, peak_event, peak_point, peak_op = -1, -1, 0, -1
    for event, op, changed in replay.run():
        if not changed:
            continue
        total = sum(replay.categories.values())
        if total > peak:
            peak, peak_event, peak_point, peak_op = total, event, len(ops), op
        ops.append(max(op, 0))
        totals.append(total)
        for name in CATEGORIES:
            columns[name].append(replay.categories[name])
        for tier, size in replay.tiers.items():
            off[tier] = max(off.get(tier, 0), size)
    ends = {end - 1 for end in tracker.forward_ends}
    at_peak: list[_State] = []
    kept: list[_State] = []
    again = Replay(tracker)
    for event, _, _ in again.run():
        if event == peak_event:
            at_peak = again.alive()
        if event in ends:
            held = [s for s in again.alive() if s.category == "activations"]
            kept = max(kept, held, key=lambda states: sum(s.bytes for s in states))
    at_peak.sort(key=lambda s: -s.bytes)
    return Story(
        timeline=Timeline(
            ops=tuple(ops),
            bytes={name: tuple(column) for name, column in columns.items()},
            total=tuple(totals),
            phases=tuple(tracker.phases),
        ),
        peak=peak,
        peak_point=peak_point,
        peak_op=peak_op,
        off_device={tier: size for tier, size in off.items() if size},
        largest=tuple(_describe(s) for s in at_peak[:largest]),
        kept=sum(s.bytes for s in kept),
        modules=_tree(model, kept),
        skips=_skips(tracker, kept, waits),
    )


def _describe(state: _State) -> TensorInfo:
    record = state.record
    return TensorInfo(
        bytes=state.bytes,
        shape=record.shape,
        dtype=record.dtype,
        category=state.category,
        op=record.op,
        module=record.module,
        phase=record.phase or "start",
    )


def _tree(model: nn.Module, kept: list[_State]) -> ModuleNode:
    own: dict[str, int] = {}
    for state in kept:
        own[state.record.module] = own.get(state.record.module, 0) + state.bytes

    def node(path: str, module: nn.Module) -> ModuleNode:
        children = tuple(node(f"{path}.{name}" if path else name, child) for name, child in module.named_children())
        mine = own.get(path, 0)
        storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in module.parameters()}
        return ModuleNode(
            path=path,
            type=type(module).__name__,
            kept=mine + sum(child.kept for child in children),
            own=mine,
            parameters=sum(storages.values()),
            children=children,
        )

    return node("", model)


def _skips(tracker: Tracker, kept: list[_State], waits: int) -> tuple[Skip, ...]:
    is_kept = {id(s.record) for s in kept}
    found, seen = [], set()
    for _, record, kind, size in tracker.events:
        trace = record.trace
        if kind != BYTES or trace.label or trace.waits < waits or id(record) in seen:
            continue
        seen.add(id(record))
        found.append(
            Skip(
                bytes=size,
                shape=record.shape,
                dtype=record.dtype,
                op=record.op,
                module=record.module,
                used_by=trace.user,
                waits=trace.waits,
                born=max(trace.born, 0),
                waits_from=max(trace.from_op, 0),
                waits_until=trace.end,
                kept=id(record) in is_kept,
            )
        )
    return tuple(sorted(found, key=lambda skip: -skip.bytes))
