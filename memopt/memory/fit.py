"""The largest batch that fits a budget, from as few profiles as possible.

The peak of a step is nearly affine in the batch size: what is there anyway, and so much for each sample. Two profiles
give a line, the line gives a guess, and a profile of the guess a better line. What counts in the end are profiles: the
answer fits, one sample more does not. Where peaks follow no line (kernels that pad, a peak that moves to another place
of the step), guesses alternate with halving, so that it ends in any case. A larger batch that raises
an error counts as one that does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memopt.errors import DoesNotFit, InputError
from memopt.memory.report import MemoryReport
from memopt.memory.show import LABELS
from memopt.units import format_bytes, parse_bytes

MOST = 1 << 20
"""The search for a batch ends here."""
SECOND = 16
"""The batch that is profiled after the smallest. From one to two the peak often does not move: the optimizer has it."""


@dataclass(frozen=True)
class BatchFit:
    """What fits a budget. All sizes are bytes."""

    budget: int
    batch: int
    """The largest batch that fits."""
    peak: int
    """Its predicted peak."""
    beyond: int | None
    """The predicted peak of one sample more, which does not fit; None if it failed, or was not tried."""
    points: dict[int, int]
    """Every batch size that was profiled, with its peak."""
    failed: str | None = None
    """The error that one sample more raised, if that is what ended the search."""

    @property
    def share(self) -> float:
        """How much of the budget the peak takes."""
        return self.peak / self.budget

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the points as pairs in order of their batch."""
        return {**dataclasses.asdict(self), "points": sorted(self.points.items())}

    def __str__(self) -> str:
        text = f"batch {self.batch}: peak {format_bytes(self.peak)}, {self.share:.1%} of {format_bytes(self.budget)}"
        if self.failed is not None:
            return f"{text}; batch {self.batch + 1} failed: {self.failed}"
        if self.beyond is None:
            return f"{text} (larger ones were not tried)"
        return f"{text}; batch {self.batch + 1}: {format_bytes(self.beyond)}"


def max_batch(
    profile_at: Callable[[int], MemoryReport | int], budget: int | float | str, *, most: int = MOST
) -> BatchFit:
    """The largest batch whose predicted peak fits a budget; one sample more has been seen not to, or to raise an error.

    Args:
        profile_at: the profile of a batch of this size, or its peak in bytes.
        budget: bytes, or a text such as ``"24GiB"``.
        most: no larger batch is tried.

    Raises:
        InputError: the budget is no size.
        DoesNotFit: a batch of one does not fit; the message says how much it needs and what holds it. A model that
            cannot take a batch of one (a batch norm, say) begins with two.
    """
    size = parse_bytes(budget, "budget")
    points: dict[int, int] = {}

    def fits(batch: int) -> bool:
        points[batch], text = _peak(profile_at(batch))
        if points[batch] > size and len(points) == 1:
            raise DoesNotFit(
                f"a batch of {batch} needs {format_bytes(points[batch])}, more than the budget of "
                f"{format_bytes(size)}{text}"
            )
        return points[batch] <= size

    low, high = _smallest(fits), most + 1
    errors: dict[int, str] = {}
    halve = False
    while high - low > 1:
        if len(points) == 1:
            guess = min(SECOND, high - 1)
        else:
            guess = (low + high) // 2 if halve and high <= most else _crossing(points, low, high, size)
        before = high - low
        try:
            enough = fits(guess)
        except Exception as error:  # a table of positions that ends, say
            errors[guess], enough = f"{type(error).__name__}: {error}", False
        if enough:
            low = guess
        else:
            high = guess
        halve = high - low > before // 2
    return BatchFit(size, low, points[low], points.get(high), points, errors.get(high))


def _smallest(fits: Callable[[int], bool]) -> int:
    try:
        fits(1)
        return 1
    except InputError as error:
        try:
            fits(2)
        except InputError:
            raise error from None
        return 2


def _peak(found: MemoryReport | int) -> tuple[int, str]:
    if not isinstance(found, MemoryReport):
        return int(found), ""
    held = sorted(((n, name) for name, n in found.peak_by_category.items() if n), reverse=True)[:3]
    return found.peak, ": " + ", ".join(f"{format_bytes(n)} of {LABELS[name]}" for n, name in held)


def _crossing(points: dict[int, int], low: int, high: int, size: int) -> int:
    """The largest batch that would fit if the peak were a line through the two points profiled last."""
    left, right = sorted(list(points)[-2:])
    rise = points[right] - points[left]
    if rise <= 0:
        return (low + high) // 2 if high in points else min(8 * low, high - 1)
    guess = left + (size - points[left]) * (right - left) // rise
    return max(low + 1, min(guess, high - 1))
