"""An ablation as a table: in a terminal, as Markdown, as CSV. The picture is in ``plots``.

All three have the same rows. The terminal and Markdown show the figures as people compare them: ratios to the row
without passes, bytes in one unit. CSV has bytes and seconds, and repeats in every row what they depend on, so that
tables of several runs can be joined.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from memopt.ablation import Ablation, Row
from memopt.memory.report import CATEGORIES, MemoryReport
from memopt.memory.show import unit

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = {
    "weights": ("parameters", "buffers"),
    "optimizer": ("optimizer_states",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "temporaries": ("temporaries",),
}
"""Columns of a table for people, and the categories they add up."""
SHORT = {"optimizer": "optim.", "gradients": "grads", "activations": "activ.", "temporaries": "temp."}
WIDE = 140
"""Narrower terminals are not shown the peak by category."""


def print_table(found: Ablation, console: Console) -> None:
    """Print the table with what it depends on, and why which rows lack figures."""
    from rich.table import Table

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    about = found.about
    say(about.get("subject", ""))
    steps = about.get("steps", "none") + (f" on {about['steps_on']}" if about.get("steps_on") else "")
    say(f"true steps: {steps}; {about['processor']}, GPU: {about['gpu']}, torch {about['torch']}\n")
    names, rows = _cells(found)
    shown = [i for i, name in enumerate(names) if console.width >= WIDE or name not in (*SHOWN, "time, s", "promised")]
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for i in shown:
        name = SHORT.get(names[i], names[i]).replace(" ", "\n")
        table.add_column(name, justify="right" if i else "left", header_style="dim", no_wrap=True)
    front = {row.name for row in found.front()}
    for row, cells in zip(found.rows, rows, strict=True):
        table.add_row(*(cells[i] for i in shown), style="bold" if row.name in front else None)
    console.print(table, highlight=False)
    for line in _notes(found):
        say(f"\n{line}")


def markdown(found: Ablation) -> str:
    """The table in Markdown, with the command that prints it and what the figures depend on."""
    names, rows = _cells(found)
    lines = ["# Ablation", "", "```console", f"$ {found.about.get('command', 'memopt ablate')}", "```", ""]
    lines += [f"- {name}: {value}" for name, value in found.about.items() if name != "command"]
    lines += ["", f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += [f"| {' | '.join(_escaped(cell) for cell in cells)} |" for cells in rows]
    for line in _notes(found):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def as_csv(found: Ablation) -> str:
    """The table as CSV, bytes and seconds; an empty field was not measured."""
    out = StringIO()
    names = ["row", "kind", "passes", "promised", "peak_bytes", "peak_ratio", *(f"{c}_bytes" for c in CATEGORIES)]
    names += ["kept_for_backward_bytes", "off_device_bytes", "seconds_median", "seconds_min", "seconds_max"]
    names += ["time_ratio", "loss_error", "gradient_error", "bitwise", "pareto", "problem", "left_out", *found.about]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    front = {row.name for row in found.front()}
    for row in found.rows:
        report, seconds = row.report, row.seconds
        cells: list[object] = [row.name, row.kind, " ".join(map(str, row.passes)), row.exactness]
        cells += [report and report.peak, found.peak_ratio(row)]
        cells += [report and report.peak_by_category.get(category, 0) for category in CATEGORIES]
        cells += [report and report.kept, report and sum(report.off_device.values())]
        cells += [row.median, min(seconds, default=None), max(seconds, default=None), found.time_ratio(row)]
        cells += [row.loss_error, row.gradient_error, row.bitwise, row.name in front if seconds else None]
        writer.writerow([*cells, row.problem, _left_out(found), *found.about.values()])
    return out.getvalue()


def _cells(found: Ablation) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the text of each cell. Columns in which nothing was measured are left out."""
    reports = [row.report for row in found.rows if row.report is not None]
    size, name = unit(max((report.peak for report in reports), default=0))

    def amount(of: Callable[[MemoryReport], int]) -> Callable[[Row], str]:
        form = ".1f" if size < 1 << 30 else ".2f"
        return lambda row: "" if row.report is None else _number(of(row.report) / size, form)

    def category(names: Sequence[str]) -> Callable[[Row], str]:
        return amount(lambda report: sum(report.peak_by_category.get(n, 0) for n in names))

    away = amount(lambda report: sum(report.off_device.values()))

    columns: dict[str, Callable[[Row], str]] = {
        "passes": lambda row: row.name,
        f"peak, {name}": amount(lambda report: report.peak),
        "ratio": lambda row: _number(found.peak_ratio(row), ".2f"),
        **{shown: category(names) for shown, names in SHOWN.items()},
        "off device": lambda row: away(row) if row.report and any(row.report.off_device.values()) else "",
        "time, s": lambda row: _number(row.median, ".3f"),
        "time, ratio": lambda row: _number(found.time_ratio(row), ".2f"),
        "error of loss": lambda row: _number(row.loss_error, ".1e"),
        "of gradients": lambda row: _number(row.gradient_error, ".1e"),
        "bitwise": _bitwise,
        "promised": lambda row: row.exactness.removeprefix("exact ") if row.passes else "",
    }
    filled = {name: [text(row) for row in found.rows] for name, text in columns.items()}
    filled = {name: cells for name, cells in filled.items() if any(cells)}
    return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]


def _number(value: float | None, form: str) -> str:
    """Small ones have three digits that count."""
    if not value:
        return "" if value is None else "0"
    return format(value, "#.3g" if form.endswith("f") and abs(value) < 1 else form)


def _bitwise(row: Row) -> str:
    if row.problem:
        return "refused" if row.kind == "refused" else "failed"
    return "" if row.bitwise is None else "yes" if row.bitwise else "no"


def _notes(found: Ablation) -> list[str]:
    lines = []
    if front := found.front():
        lines.append(f"Pareto front of memory and time: {', '.join(row.name for row in front)}.")
    for row in found.rows:
        if row.problem:
            lines.append(f"{row.name}: {row.problem.removeprefix(f'{row.name}: ')}")
    if not found.steady:
        lines.append(
            "The model itself differs from run to run or gives NaN, as the row none shows: errors say nothing."
        )
    elif found.rows[0].bitwise is False:
        lines.append("The model itself differs from run to run: errors as small as those of the row none say nothing.")
    if broken := [row.name for row in found.rows if found.breaks(row)]:
        lines.append(f"Not as exact as promised: {', '.join(broken)}.")
    for row in found.rows:
        if row.notes and (found.breaks(row) or not _finite(row)):
            lines.append(f"{row.name}: {'; '.join(row.notes)}.")
    if found.left_out:
        lines.append(f"Left out: {_left_out(found)}.")
    return lines


def _left_out(found: Ablation) -> str:
    return "; ".join(f"{name} ({why})" for name, why in found.left_out.items())


def _finite(row: Row) -> bool:
    return all(error is None or math.isfinite(error) for error in (row.loss_error, row.gradient_error))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
