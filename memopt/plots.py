"""Pictures of a run: the loss curve and sample grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memopt.recipe import Grid


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
    _save(figure, file)


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
    _save(figure, file)


def _save(figure: object, file: Path) -> None:
    partial = file.with_name(f".partial-{file.name}")
    figure.savefig(partial, dpi=120, format="png")  # type: ignore[attr-defined]
    partial.replace(file)
