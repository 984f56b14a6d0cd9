"""What ``handle.report()`` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memopt.core import Claim


@dataclass(frozen=True)
class ReportRow:
    """One pass of a report."""

    name: str
    exact: bool
    config: str
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What each pass found and did. ``print(report)`` shows it; ``rows`` holds it."""

    rows: tuple[ReportRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no passes applied"
        lines = []
        for row in self.rows:
            lines.append(f"{row.config}  [{'exact' if row.exact else 'not exact'}]")
            for aspect, paths in _by_aspect(row.claims).items():
                shown = ", ".join(paths[:4]) + (f", ... ({len(paths)} in all)" if len(paths) > 4 else "")
                lines.append(f"  {aspect}: {shown}")
            lines.extend(f"  {note}" for note in row.notes)
            lines.extend(f"  {what}: {count}" for what, count in row.counts.items())
        return "\n".join(lines)


def _by_aspect(claims: Iterable[Claim]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for claim in claims:
        grouped.setdefault(claim.aspect, []).append(claim.path or "the whole model")
    return grouped
