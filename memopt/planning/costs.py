"""What each block of a model costs in memory and time, read off one watched step.

A step goes through the blocks and comes back. What a block keeps for backward is there from the end of its forward to
the end of its backward; while it works, it needs more. So at any moment the memory in use is that of the block at work,
that of everything else, and what the blocks that wait have kept. A step is cut into *moments*, stretches in which the
block at work and those that wait are the same, and of each only its highest point is remembered. Since what a block
keeps and what it needs depend on what is done with it alone, steps in which all blocks were treated alike tell about
any mixture.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from memopt.blocks import find_blocks
from memopt.hardware import Hardware
from memopt.memory.profiler import Watched
from memopt.memory.timeline import Story
from memopt.passes import Checkpoint
from memopt.registry import Pass, matching_modules

LOOKS = {"cheap": 10, "full": 6, "lean_ops": 9, "offload_activations": 2, "fused_attention": 2}
"""How often Python looks at an operation of forward for a pass, or a checkpoint's policy, then and in backward.

In units of :attr:`Hardware.look`. Measured on a CPU, one example at a time, in HAE V2, DiT, GPT-2 and
UNet2DConditionModel, it was 8-15, 5-8, 8-10 and 2-6; in HAE V2 and a guided UNet 2-3 for fused attention. Other passes
look at a full checkpoint's second forward again.
"""
Moment = tuple[str, int, tuple[int, ...]]
"""The phase, the block at work (-1: none) and those that wait for their backward."""


@dataclass(frozen=True)
class BlockCosts:
    """One block in one step."""

    kept: int
    """Bytes of what it made that are kept for backward at the end of forward."""
    seconds: float
    """Estimated time of its operations, recomputed ones included."""


@dataclass(frozen=True)
class StepCosts:
    """One step, all blocks treated alike. Bytes and seconds."""

    peak: int
    seconds: float
    """Estimated time of the step."""
    blocks: tuple[BlockCosts, ...]
    moments: dict[Moment, int]
    """The most in use in each moment, without what waiting blocks have kept."""
    story: Story


def carried(step: StepCosts, before: StepCosts, after: StepCosts) -> StepCosts:
    """A step's costs with more passes, from what these do to the step whose blocks are all kept: a guess.

    What they change outside of blocks they change alike, whatever is done with blocks, and what a treated block keeps
    is a part of what it would keep otherwise.
    """
    more: dict[str, int] = {}
    for moment, size in after.moments.items():
        if moment in before.moments:
            change = size - before.moments[moment]
            more[moment[0]] = max(more.get(moment[0], change), change)
    return StepCosts(
        peak=step.peak + max(more.values(), default=0),
        seconds=step.seconds + after.seconds - before.seconds,
        blocks=tuple(
            BlockCosts(min(block.kept, b.kept), max(0.0, block.seconds + b.seconds - a.seconds))
            for block, a, b in zip(step.blocks, before.blocks, after.blocks, strict=True)
        ),
        moments={moment: max(0, size + more.get(moment[0], 0)) for moment, size in step.moments.items()},
        story=step.story,
    )


def costs_of(watched: Watched, blocks: Sequence[str], hardware: Hardware, passes: Sequence[Pass] = ()) -> StepCosts:
    """The costs of a step that was watched, for the blocks of these paths, none inside another.

    ``passes`` are those that it ran with: what Python does for them is not among its operations.
    """
    tracker, story = watched.tracker, watched.story
    number = {path: i for i, path in enumerate(blocks)}
    owners = _Owners(number)
    at = [owners.of(path) for path in tracker.paths]
    works = [hardware.seconds(cost) for cost in tracker.costs]
    if hardware.look:
        looks = _Looks(watched.model, passes)
        for name, first, end in watched.story.timeline.phases:
            if name == "forward":
                for op in range(first, end):
                    works[op] += hardware.look * looks.at(tracker.paths[op])
    seconds = [0.0] * len(blocks)
    for owner, work in zip(at, works, strict=True):
        if owner >= 0:
            seconds[owner] += work
    kept = {node.path: node.kept for _, node in story.modules.walk()}
    found = tuple(BlockCosts(kept.get(path, 0), seconds[i]) for path, i in number.items())
    total = sum(works)
    return StepCosts(
        peak=story.peak,
        seconds=total + hardware.exposed(tracker.transferred, total),
        blocks=found,
        moments=_moments(watched, at, [block.kept for block in found]),
        story=story,
    )


class _Looks:
    """How often Python looks at a module's operations."""

    def __init__(self, model: nn.Module, passes: Sequence[Pass]) -> None:
        parts = [pass_ for pass_ in passes if getattr(pass_, "blocks", "")]
        self.everywhere = sum(LOOKS.get(pass_.name, 0) for pass_ in passes if pass_ not in parts)
        self.inside: dict[str, int] = {}
        for pass_ in parts:
            blocks: str | tuple[str, ...] = pass_.blocks  # type: ignore[attr-defined]
            each = LOOKS.get(pass_.name, 0)
            if isinstance(pass_, Checkpoint):
                each = LOOKS["full"] + self.everywhere if pass_.policy == "full" else LOOKS["cheap"]
            for path in find_blocks(model) if blocks == "auto" else matching_modules(model, blocks):
                self.inside[path] = self.inside.get(path, 0) + each
        self.owners = _Owners({path: i for i, path in enumerate(self.inside)})
        self.counts = list(self.inside.values())

    def at(self, path: str) -> int:
        """For an operation of the module at this path."""
        owner = self.owners.of(path)
        return self.everywhere + (self.counts[owner] if owner >= 0 else 0)


class _Owners:
    """Which block a module belongs to, by paths."""

    def __init__(self, number: dict[str, int]) -> None:
        self.number = number
        self.known: dict[str, int] = {}

    def of(self, path: str) -> int:
        if path not in self.known:
            parts = path.split(".")
            prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
            self.known[path] = next((self.number[p] for p in prefixes if p in self.number), -1)
        return self.known[path]


def _moments(watched: Watched, at: list[int], kept: list[int]) -> dict[Moment, int]:
    timeline = watched.story.timeline
    phases = ["between"] * len(at)
    for name, first, end in timeline.phases:
        phases[first:end] = [name] * (end - first)
    changes: dict[int, list[tuple[int, int]]] = {}
    for block, spans in _ends(timeline.phases, at).items():
        for begin, end in spans:
            changes.setdefault(begin + 1, []).append((block, 1))
            changes.setdefault(end + 1, []).append((block, -1))
    order = deque(sorted(changes))
    waits: Counter[int] = Counter()
    found: dict[Moment, int] = {}
    key: Moment = ("start", -1, ())
    before, held = -1, 0
    for op, total in zip(timeline.ops, timeline.total, strict=True):
        if op != before:
            before = op
            phase, worker = (phases[op], at[op]) if 0 <= op < len(at) else ("between", -1)
            moved = bool(order) and order[0] <= op
            while order and order[0] <= op:
                for block, change in changes[order.popleft()]:
                    waits[block] += change
            if moved or key[:2] != (phase, worker):
                waiting = tuple(sorted(i for i, n in waits.items() if n and i != worker))
                key, held = (phase, worker, waiting), sum(kept[i] for i in waiting)
        found[key] = max(found.get(key, 0), total - held)
    return found


def _ends(phases: Sequence[tuple[str, int, int]], at: list[int]) -> dict[int, list[tuple[int, int]]]:
    """For each block the spans of operations, one for each microbatch, from its first in forward to its last in
    backward."""
    found: dict[int, list[tuple[int, int]]] = {}
    forward: dict[int, int] = {}
    for name, first, end in phases:
        if name == "forward":
            forward = {}
            for op in range(end - 1, first - 1, -1):
                if at[op] >= 0:
                    forward[at[op]] = op
        elif name == "backward":
            last = {at[op]: op for op in range(first, end) if at[op] >= 0}
            for block, begin in forward.items():
                found.setdefault(block, []).append((begin, last.get(block, begin)))
    return found
