"""Time against peak memory: plans for many budgets, beside what people do by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memopt.errors import DoesNotFit, MemoptError
from memopt.planning.plans import describe
from memopt.units import format_bytes

if TYPE_CHECKING:
    from memopt.planning.planner import Search

_SWITCHES = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing", "is_gradient_checkpointing"),
    ("activation_checkpointing_enable", "activation_checkpointing_disable", "is_activation_checkpointing"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing"),
)
"""How diffusers, and transformers since and before its version 5, turn a model's own checkpointing on and off, and say
which it is."""
BUDGETS = 12
"""How many budgets are planned for, from the plain peak down to the smallest that fits."""


@dataclass(frozen=True)
class Point:
    """A way to run a step."""

    name: str
    peak: int
    """Bytes, from a profile."""
    seconds: float
    """Estimated."""
    kind: str
    """``plain``, ``plan`` or ``by hand``."""


def compare(search: Search) -> list[Point]:
    """The step without passes first, then plans from the largest budget to the smallest, then the others.

    Passes that were given to the search are in all but the first.
    """
    bare, plain = search.bare(), search.plain()
    points = [Point("no passes", bare.peak, bare.seconds, "plain")]
    if search.given:
        names = ", ".join(map(describe, search.given))
        points.append(Point(f"{names}, as given", plain.peak, plain.seconds, "plan"))
    least = search.smallest()
    for k in range(1, BUDGETS + 1):
        budget = plain.peak - (plain.peak - least.peak) * k // BUDGETS
        try:
            plan = search.plan(budget)
        except DoesNotFit:
            continue
        points.append(Point(f"plan for {format_bytes(budget)}", plan.peak, plan.seconds, "plan"))
    return points + by_hand(search)


def by_hand(search: Search) -> list[Point]:
    """Checkpoints around every block, every second, ...; what a step's peak and time are with them."""
    found = []
    for k in (1, 2, 3, 4):
        chosen = search.blocks[::k]
        if len(chosen) < 2 and k > 1:
            break
        tried = search.look(search.treated({"full": chosen})) if chosen else None
        if tried is not None:
            every = "every block" if k == 1 else f"one block in {k}"
            found.append(Point(f"checkpoint {every}", tried.peak, tried.seconds, "by hand"))
    return [*found, *_own(search)]


def _own(search: Search) -> list[Point]:
    """The model's own gradient checkpointing, as diffusers' and transformers' models have it."""
    model = search.work.model
    for on, off, is_on in _SWITCHES:
        if not search.train or not hasattr(model, on):
            continue
        if getattr(model, is_on, True):
            break
        try:
            getattr(model, on)()
        except ValueError:  # some have the method and say that they cannot
            continue
        try:
            costs = search.costs(search.given)
        except MemoptError:
            continue
        finally:
            getattr(model, off)()
        return [Point("the model's own checkpointing", costs.peak, costs.seconds, "by hand")]
    return []


def draw(points: Sequence[Point], search: Search, file: Path) -> None:
    """A PNG of the points."""
    from matplotlib.figure import Figure

    from memopt.memory.show import unit
    from memopt.plots import save

    size, name = unit(max(point.peak for point in points))
    plain = points[0]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    given = f", with {', '.join(map(describe, search.given))}" if search.given else ""
    shown = [("ks", "no passes", [plain]), ("C0o-", "plans", [p for p in points if p.kind == "plan"])]
    by_hand = [p for p in points if p.kind == "by hand"]
    shown += [(f"C3{shape}", f"{p.name}{given}", [p]) for shape, p in zip("^v<>D", by_hand, strict=False)]
    for style, label, chosen in shown:
        chosen = sorted(chosen, key=lambda p: p.peak)
        axes.plot([p.seconds / plain.seconds for p in chosen], [p.peak / size for p in chosen], style, label=label)
    axes.set(xlabel="estimated time of a step, relative to no passes", ylabel=f"peak memory ({name})", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    kind = "training step" if search.train else "forward"
    model = type(search.work.model).__name__
    figure.suptitle(f"{model}: {kind} on {search.device} ({search.hardware.name})", fontsize=11)
    save(figure, file)
