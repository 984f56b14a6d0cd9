"""A memory report in a terminal and as a picture; ``html`` makes the page and shares the helpers at the top.

A timeline can have many more points than a picture has columns. ``columns`` brings it down: each column shows the state
with the most live bytes among the changes in it, or, where nothing changed, the state it inherits. So no maximum is
lost, the categories of a column are those of one moment and add up, and the peak stands at its own operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from memopt import files
from memopt.memory.report import CATEGORIES, MemoryReport, ModuleNode
from memopt.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

LABELS = {name: name.replace("_", " ") for name in CATEGORIES}
COLOURS = {  # of Okabe and Ito: told apart with every kind of colour vision
    "parameters": "#0072B2",
    "buffers": "#56B4E9",
    "optimizer_states": "#CC79A7",
    "gradients": "#009E73",
    "activations": "#E69F00",
    "temporaries": "#999999",
}
LARGEST = SKIPS = 8
NODES = 12
WORTH = 0.02
"""Modules with a smaller share of what is kept for backward are not in the summary."""


@dataclass(frozen=True)
class Columns:
    """A timeline brought down to few columns. Column i spans the operations from ``edges[i]`` to ``edges[i + 1]``."""

    edges: tuple[float, ...]
    bytes: dict[str, list[int]]
    """The categories with bytes anywhere, in the order of ``CATEGORIES``."""
    peak: int
    """The column of the peak."""


def columns(report: MemoryReport, most: int) -> Columns:
    """The timeline in at most so many columns, one for each operation if they suffice."""
    line = report.timeline
    first = min([start for _, start, _ in line.phases] + list(line.ops[:1]), default=0)
    end = max([end for _, _, end in line.phases] + [op + 1 for op in line.ops[-1:]] + [first + 1])
    count = min(most, end - first)
    highest: list[int | None] = [None] * count
    last: list[int | None] = [None] * count
    for point, (op, total) in enumerate(zip(line.ops, line.total, strict=True)):
        at = (op - first) * count // (end - first)
        best = highest[at]
        if best is None or total > line.total[best]:
            highest[at] = point
        last[at] = point
    before: int | None = None
    for at in range(count):
        if highest[at] is None:
            highest[at] = before
        else:
            before = last[at]
    states = {
        name: [report.start_by_category.get(name, 0) if point is None else line.bytes[name][point] for point in highest]
        for name in CATEGORIES
    }
    return Columns(
        edges=tuple(first + (end - first) * i / count for i in range(count + 1)),
        bytes={name: values for name, values in states.items() if any(values)},
        peak=(line.ops[report.peak_point] - first) * count // (end - first) if line.ops else 0,
    )


def unit(peak: int) -> tuple[int, str]:
    """The unit of an axis up to this many bytes, in bytes and by name: GiB from half a GiB on, then MiB, then KiB."""
    return next(
        ((1 << bits, name) for bits, name in ((30, "GiB"), (20, "MiB")) if 2 * peak >= 1 << bits), (1024, "KiB")
    )


def shorten(text: str, width: int) -> str:
    """The text with an ellipsis in its middle if it is longer than that. The end of a path says more and gets more."""
    if len(text) <= width:
        return text
    head = max(0, width - 1) // 4
    return text[:head] + "…" + text[len(text) - max(0, width - 1 - head) :]


def spread(centres: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for labels in a row that stay within the bounds and do not overlap, near the ones wanted."""
    placed: list[float] = []
    edge = low
    for centre, width in zip(centres, widths, strict=True):
        placed.append(max(centre, edge + width / 2))
        edge = placed[-1] + width / 2
    edge = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], edge - widths[i] / 2)
        edge = placed[i] - widths[i] / 2
    return placed


def kind(report: MemoryReport) -> str:
    """What was profiled, as ``training step on cuda``."""
    return f"{'training step' if report.train else 'inference'} on {report.device}"


def origin(report: MemoryReport) -> str:
    """Where the figures come from."""
    return "measured on a true step" if report.real else "computed on fake tensors"


def where(report: MemoryReport, width: int = 10_000) -> str:
    """Phase, operation and module of the peak, the path of the module shortened so that all of it has that width."""
    if report.peak_phase == "start":
        return "before the step"
    phase = "the optimizer" if report.peak_phase == "optimizer" else report.peak_phase
    text = f"in {phase}, " + (f"at {report.peak_op} " if report.peak_op else "") + "in "
    return text + shorten(report.peak_module or report.model, max(12, width - len(text)))


def shape(sizes: Sequence[int]) -> str:
    """As ``8×128×64×64``."""
    return "×".join(map(str, sizes)) or "scalar"


def share(part: int, whole: int) -> str:
    """As ``12.3%``."""
    return f"{100 * part / max(1, whole):.1f}%"


def summary(report: MemoryReport, width: int = 110) -> str:
    """The report as plain text, no line of which is longer than ``width``."""
    from rich.console import Console

    out = StringIO()
    # A notebook would otherwise get the text as a display of its own rather than in the file.
    console = Console(file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    print_summary(report, console)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def print_summary(report: MemoryReport, console: Console | None = None) -> None:
    """Print the report, coloured where the console has colour."""
    from rich.console import Console

    console = console or Console()
    console.print(_content(report, console.width))


def plot_timeline(report: MemoryReport, file: Path) -> None:
    """Write the timeline as a PNG: live bytes stacked by category, the peak marked, phases shaded.

    Raises:
        InputError: the file cannot be written.
    """
    picture = BytesIO()
    _figure(report).savefig(picture, dpi=120, format="png")
    files.write(file, picture.getvalue())


def _content(report: MemoryReport, width: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    head = Text(report.model, style="bold")
    head.append(f": {kind(report)}, {origin(report)}; inputs: {report.inputs}", style="not bold")
    head.append(f"; passes: {', '.join(report.passes) or 'none'}", style="not bold")
    peak = Text(f"Peak {format_bytes(report.peak)}", style="bold")
    peak.append(" " + where(report, width - len(peak) - 1), style="not bold")
    parts: list[Text | Table] = [head, Text(), peak, Text(), _categories(report, width)]
    if off := {tier: size for tier, size in report.off_device.items() if size}:
        parts += [
            Text(),
            Text("Off the device, at most: " + ", ".join(f"{format_bytes(off[tier])} on {tier}" for tier in off)),
        ]
    if report.kept:
        parts += [_heading(f"Kept for backward: {format_bytes(report.kept)}, by module"), _modules(report, width)]
    if report.largest:
        parts += [_heading("Largest tensors at the peak"), _tensors(report, width)]
    if report.skips:
        parts += [_heading("Skip connections: tensors that wait while other modules are called"), _skips(report, width)]
    if report.assumptions:
        parts += [
            _heading("Assumptions"),
            _table([("", ""), ("", "wrap")], [["-", t] for t in report.assumptions], width),
        ]
    return Group(*parts)


def _heading(text: str) -> Text:
    from rich.text import Text

    return Text(f"\n{text}", style="bold")


def _categories(report: MemoryReport, width: int) -> Table:
    from rich.text import Text

    room = max(8, min(50, width - 44))
    rows: list[list[str | Text]] = []
    for name in CATEGORIES:
        if size := report.peak_by_category.get(name, 0):
            bar = Text(_bar(size / max(1, report.peak), room), style=COLOURS[name])
            rows.append([LABELS[name], format_bytes(size), share(size, report.peak), bar])
    return _table([("at the peak", ""), ("bytes", "right"), ("share", "right"), ("", "")], rows, width)


def _modules(report: MemoryReport, width: int) -> Table:
    """The heaviest modules under their parents. What a module made outside its children is one more child."""
    from rich.text import Text

    rows: list[tuple[int, int, str, str]] = []  # depth, bytes, name, type

    def add(node: ModuleNode, depth: int, above: str) -> None:
        # A chain of modules that each hold just what the next one holds is one line.
        while len(heavy := [child for child in node.children if child.kept]) == 1 and heavy[0].kept == node.kept:
            if depth == 0:
                break
            node = heavy[0]
        name = node.path[len(above) :].lstrip(".") if node.path else report.model
        rows.append((depth, node.kept, name, node.type if node.path else ""))
        if heavy and node.own:
            rows.append((depth + 1, node.own, "(outside its children)", ""))
        for child in heavy:
            add(child, depth + 1, node.path)

    add(report.modules, 0, "")
    worth = [i for i, row in enumerate(rows) if row[1] >= WORTH * report.kept]
    # A parent holds no less than its child and is less deep, so the heaviest include the parents of each.
    chosen = sorted(sorted(worth, key=lambda i: (-rows[i][1], rows[i][0]))[:NODES])
    lines: list[list[str | Text]] = [
        [
            format_bytes(size),
            share(size, report.kept),
            Text(_bar(size / report.kept, 16), style=COLOURS["activations"]),
            "  " * depth + name + (f" ({kind_of})" if kind_of else ""),
        ]
        for depth, size, name, kind_of in (rows[i] for i in chosen)
    ]
    return _table([("kept", "right"), ("share", "right"), ("", ""), ("module", "shorten")], lines, width)


def _tensors(report: MemoryReport, width: int) -> Table:
    names = [("size", "right"), ("shape", ""), ("dtype", ""), ("category", "")]
    rows: list[list[str | Text]] = []
    for t in report.largest[:LARGEST]:
        made = [t.op.removeprefix("aten."), t.module or report.model]
        if width < 100:  # one below the other
            made = ["\n".join(filter(None, made))]
        rows.append([format_bytes(t.bytes), shorten(shape(t.shape), 18), t.dtype, LABELS[t.category], *made])
    last = ["operation, module"] if width < 100 else ["operation", "module"]
    return _table(names + [(name, "shorten") for name in last], rows, width)


def _skips(report: MemoryReport, width: int) -> Table:
    rows: list[list[str | Text]] = [
        [
            format_bytes(s.bytes),
            shorten(shape(s.shape), 18),
            str(s.waits),
            s.module or report.model,
            s.used_by or report.model,
        ]
        for s in report.skips[:SKIPS]
    ]
    names = [("size", "right"), ("shape", ""), ("calls", "right"), ("made in", "shorten"), ("used by", "shorten")]
    return _table(names, rows, width)


def _table(names: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Text]], width: int) -> Table:
    """A table without lines. Columns that are to ``shorten`` share the room that the others leave."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=any(name for name, _ in names))
    for name, style in names:
        right, wrap = style == "right", style == "wrap"
        table.add_column(name, justify="right" if right else "left", no_wrap=not wrap, header_style="dim")
    natural = [
        max(len(line) for row in [[name] * len(names), *rows] for line in str(row[i]).split("\n"))
        for i, (name, _) in enumerate(names)
    ]
    flexible = sorted((i for i, (_, style) in enumerate(names) if style == "shorten"), key=lambda i: natural[i])
    room = width - 2 * (len(names) - 1) - sum(n for i, n in enumerate(natural) if i not in flexible)
    limits: dict[int, int] = {}
    for done, i in enumerate(flexible):  # the narrowest first: what it leaves goes to the others
        limits[i] = max(8, min(natural[i], room // (len(flexible) - done)))
        room -= limits[i]
    for row in rows:
        cells = [
            Text("\n".join(shorten(line, limits.get(i, len(line))) for line in cell.split("\n")))
            if isinstance(cell, str)
            else cell
            for i, cell in enumerate(row)
        ]
        table.add_row(*cells)
    return table


def _bar(part: float, width: int) -> str:
    """Full blocks and one partial block; anything at all shows."""
    eighths = max(1, round(8 * width * min(1.0, part)))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _figure(report: MemoryReport) -> Figure:
    from matplotlib.figure import Figure

    shown = columns(report, 1200)
    size, name = unit(report.peak)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    left, right = shown.edges[0], shown.edges[-1]
    peak = report.peak / size
    axes.set(xlim=(left, right), ylim=(0, 1.32 * peak or 1))

    stacked = [0.0] * len(shown.edges)
    for category, values in shown.bytes.items():
        below, stacked = stacked, [b + v / size for b, v in zip(stacked, [*values, values[-1]], strict=True)]
        label = f"{format_bytes(report.peak_by_category.get(category, 0))}  {LABELS[category]}"
        axes.fill_between(
            shown.edges, below, stacked, step="post", color=COLOURS[category], linewidth=0, label=label, zorder=2
        )
    axes.step(shown.edges, stacked, where="post", color="black", linewidth=0.4, zorder=3)

    # Rows above the data: names of the phases, then two lines of text about the peak, then its point.
    names = [phase for phase, _, _ in report.timeline.phases]
    middles = [(start + end) / 2 for _, start, end in report.timeline.phases]
    widths = [(right - left) * 0.011 * (len(phase) + 2) for phase in names]
    for i, (phase, start, end) in enumerate(report.timeline.phases):
        axes.axvspan(start, end, color="black", alpha=(0.02, 0.07)[i % 2], linewidth=0, zorder=0)
        at = spread(middles, widths, left, right)[i]
        axes.text(at, 1.27 * peak, phase, ha="center", va="center", color="0.35", fontsize=10, parse_math=False)
    x = (shown.edges[shown.peak] + shown.edges[shown.peak + 1]) / 2
    third = int(3 * (x - left) / (right - left))
    axes.plot([x, x], [0, peak], color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=4)
    axes.plot([x], [peak], "o", color="black", markersize=6, zorder=5)
    axes.annotate(
        f"peak {format_bytes(report.peak)}\n{where(report, 68)}",
        (x, peak),
        xytext=((2, 0, -2)[third], 8),
        textcoords="offset points",
        ha=("left", "center", "right")[third],
        va="bottom",
        fontsize=10,
        parse_math=False,
    )
    title = f"{report.model}: {kind(report)}, {origin(report)}"
    second = f"{report.inputs}; passes: {', '.join(report.passes)}" if report.passes else report.inputs
    axes.set_title(f"{shorten(title, 100)}\n{shorten(second, 100)}", fontsize=11, parse_math=False)
    axes.set(xlabel="operation", ylabel=f"live bytes ({name})")
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= peak])  # no lines through the rows of text
    axes.grid(alpha=0.3, axis="y", zorder=1)
    handles, labels = axes.get_legend_handles_labels()
    # Same order as in the stack: the first category lies at the bottom.
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title="at the peak", frameon=False)
    return figure
