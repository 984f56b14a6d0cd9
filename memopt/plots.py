"""Pictures: the loss curve and sample grids of a run, memory against time of an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt import files
from memopt.errors import MemoptError
from memopt.recipe import Grid

if TYPE_CHECKING:
    from memopt.ablation import Ablation


def loss_curve(steps: Sequence[int], losses: Sequence[float], file: Path, *, title: str) -> None:
    """The loss of every step, thin, and its running mean over a fiftieth of the run, bold."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="each step")
    window = max(1, len(losses) // 50)
    if window > 1:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], mean, color="C0", linewidth=2, label=f"mean of {window} steps")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, file)


def sample_grid(grid: Grid, file: Path) -> None:
    """A grid of grey pictures with its row and column labels."""
    from matplotlib.figure import Figure

    rows, columns, height, width = grid.images.shape
    inches = 1.9 * max(1.0, width / height) ** 0.5
    figure = Figure(figsize=(inches * columns + 0.8, inches * height / width * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    images = grid.images.float().cpu().numpy()
    for r in range(rows):
        for c in range(columns):
            axes[r, c].imshow(images[r, c], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axes[r, c].set(xticks=[], yticks=[])
        axes[r, 0].set_ylabel(grid.rows[r])
    for c in range(columns):
        axes[0, c].set_title(grid.columns[c], fontsize="small")
    figure.suptitle(grid.title)
    save(figure, file)


def pareto(found: Ablation, file: Path) -> None:
    """Peak memory against time of a step, a point for each row, and the Pareto front.

    Labels stand in a column beside the points, in the order of their memory, and so never overlap.

    Raises:
        MemoptError: there is no such row.
    """
    from matplotlib.figure import Figure

    from memopt.memory.show import shorten, spread, unit

    rows = sorted(
        ((row.report.peak, row.median, row) for row in found.rows if row.report and row.median is not None),
        key=lambda known: known[:2],
    )
    styles = {"none": "ks", "one": "C0o", "all but one": "C1^", "all": "C2D", "refused": "C3X"}
    texts = {"none": "no passes", "one": "one pass", "all but one": "all passes but one", "all": "all passes"}
    if not rows:
        raise MemoptError("there is nothing to draw: no row has both memory and time")
    size, name = unit(max(peak for peak, _, _ in rows))
    line = 0.21  # inches for a label
    figure = Figure(figsize=(11.5, max(5.5, line * len(rows) + 2)))
    inches = figure.get_figheight()
    axes = figure.add_axes((0.07, 1 / inches, 0.6, 1 - 1.9 / inches))
    front = sorted((row.median or 0.0, row.report.peak / size) for row in found.front() if row.report)
    label = "Pareto front (names in bold)"
    axes.step(*zip(*front, strict=True), where="post", color="C3", alpha=0.6, linewidth=1.5, label=label)
    for kind, style in styles.items():
        points = [(seconds, peak / size, row.exactness) for peak, seconds, row in rows if row.kind == kind]
        label = texts.get(kind, kind)
        for exact, fill in ((True, "full"), (False, "none")):
            chosen = [(x, y) for x, y, promised in points if (promised != "not exact") is exact]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), style, fillstyle=fill, markersize=7, label=label, zorder=4)
                label = "_"  # one entry in the legend
    if any(row.exactness == "not exact" for _, _, row in rows):
        axes.plot([], [], "o", color="0.4", fillstyle="none", markersize=7, label="hollow: not exact")
    slowest, fastest = max(x for _, x, _ in rows), min(x for _, x, _ in rows)
    if slowest > 4 * fastest:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    axes.margins(0.06)
    where = f" on {found.about['steps_on']}" if found.about.get("steps_on") else ""
    axes.set(ylim=(0, 1.06 * max(peak for peak, _, _ in rows) / size))
    axes.set(xlabel=f"time of a step (s){where}", ylabel=f"peak memory ({name})")
    axes.grid(alpha=0.3)
    height = axes.get_position().height * inches
    if plain := found.rows[0].median:
        ratio = axes.secondary_xaxis("top", functions=(partial(mul, 1 / plain), partial(mul, plain)))
        ratio.set_xlabel("relative to no passes")
        if slowest > 4 * fastest:
            _plain_ticks(ratio.xaxis)
    top = axes.get_ylim()[1]
    best = {row.name for row in found.front()}
    wanted = [peak / size / top * height for peak, _, _ in rows]
    for (peak, seconds, row), at in zip(rows, spread(wanted, [line] * len(rows), 0, height), strict=True):
        axes.annotate(
            shorten(row.name, 46),
            (seconds, peak / size),
            xytext=(1.05, at / height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            fontweight="bold" if row.name in best else "normal",
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkB": 4},
        )
    title = found.about.get("subject", "").partition(";")[0]
    figure.suptitle(shorten(title, 110), fontsize=11, parse_math=False, y=1 - 0.2 / inches)
    figure.legend(loc="lower left", fontsize=9, ncols=7, frameon=False, columnspacing=1.2)
    save(figure, file)


def _plain_ticks(axis: Any) -> None:
    """On a logarithmic axis numbers as people write them, and more than one in a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def save(figure: object, file: Path) -> None:
    """Write a figure of matplotlib's as PNG."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=120, format="png")  # type: ignore[attr-defined]
    files.write(file, drawn.getvalue())
