"""What ``handle.report()`` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memopt.units import format_bytes

if TYPE_CHECKING:
    from memopt.registry import Claim


@dataclass(frozen=True)
class Saving:
    """Bytes of a step without and with a pass, by the fake profile."""

    peak: tuple[int, int]
    """The most at once, before and after."""
    kept: tuple[int, int]
    """Kept for backward, before and after."""

    def __str__(self) -> str:
        texts = []
        for what, (before, after) in (("peak", self.peak), ("kept for backward", self.kept)):
            if before or after:
                change = f" ({(after - before) / before:+.1%})" if before else ""
                texts.append(f"{what} {format_bytes(before)} -> {format_bytes(after)}{change}")
        return ", ".join(texts)


@dataclass(frozen=True)
class ReportRow:
    """One pass of a report."""

    name: str
    exact: bool
    exactness: str
    """In words: exact, exact to rounding, not exact."""
    config: str
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    counts: Mapping[str, int]
    saving: Saving | None = None
    """What it saves on top of the passes before it, if the report was asked with inputs."""


@dataclass(frozen=True)
class Report:
    """What each pass found and did. ``print(report)`` shows it; ``rows`` holds it."""

    rows: tuple[ReportRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no passes applied"
        lines = []
        for row in self.rows:
            lines.append(f"{row.config}  [{row.exactness}]")
            for aspect, paths in _by_aspect(row.claims).items():
                shown = ", ".join(paths[:4]) + (f", ... ({len(paths)} in all)" if len(paths) > 4 else "")
                lines.append(f"  {aspect}: {shown}")
            lines.extend(f"  {note}" for note in row.notes)
            lines.extend(f"  {what}: {count}" for what, count in row.counts.items())
            if row.saving is not None:
                lines.append(f"  {row.saving}")
        return "\n".join(lines)


def _by_aspect(claims: Iterable[Claim]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for claim in claims:
        grouped.setdefault(claim.aspect, []).append(claim.path or "the whole model")
    return grouped
