"""Pictures of a translation's findings, as figures of matplotlib; `save` writes one as PNG.

Colours tell apart for the colour-blind, too. No text is read as mathematics: names may hold any sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memopt.plots import save

from .results import MODALITIES, Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Overlap", "all_curves", "curves", "overlap", "panel", "roc_pr", "save", "scores", "verdict", "where"]

NAMES = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
HEALTHY, UNHEALTHY = "#0072B2", "#D55E00"
TRUTH, MASK = "#00E5FF", "#FFB000"
PARTS = {
    "found": ("#009E73", 0.0, "left"),
    "missed": ("#56B4E9", 0.42, "center"),
    "false alarm": ("#D55E00", 1.0, "right"),
}
"""Of truth and mask laid over each other: colour, and where the key to it stands."""
EVIDENCE = {"error": "mean squared error", "gradient": "size of M's gradient"}
"""What the anomaly maps show, by the setting of that name."""
POINTS = 2000
"""That a drawn curve has at most."""
Floats = NDArray[np.float64]


class Overlap(NamedTuple):
    """Of one slice's truth and mask."""

    truth: int
    """Pixels, as in the following of the brain alone."""
    mask: int
    dice: float
    """1, as is the next, where neither truth nor mask has a pixel."""
    iou: float


def overlap(findings: Findings, index: int) -> Overlap:
    """How far the mask of one slice is its truth."""
    foreground = findings.slices.foreground[index]
    truth, mask = findings.slices.truth[index] & foreground, findings.ours.masks[index] & foreground
    both, either = int((truth & mask).sum()), int((truth | mask).sum())
    dice, iou = (2 * both / (both + either), both / either) if either else (1.0, 1.0)
    return Overlap(int(truth.sum()), int(mask.sum()), dice, iou)


def where(findings: Findings, index: int) -> str:
    """Which slice it is, as in "BraTS2021_00027, slice 108"."""
    data = findings.slices
    return f"{data.patients[data.patient[index]]}, slice {data.slices[index]}"


def verdict(findings: Findings, index: int) -> str:
    """What the method says about a slice, as in "called unhealthy (score 0.0123, threshold 0.01)"."""
    word = "unhealthy" if findings.ours.unhealthy[index] else "healthy"
    return f"called {word} (score {findings.ours.scores[index]:.3g}, threshold {findings.threshold:.3g})"


def panel(findings: Findings, index: int) -> Figure:
    """One slice: modalities, truth, anomaly map, predicted mask, and truth and mask together."""
    from matplotlib.figure import Figure

    data, ours = findings.slices, findings.ours
    truth, mask = data.truth[index], ours.masks[index]
    flair = data.images[index, MODALITIES.index("flair")]
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, name, image in zip(axes[0], MODALITIES, data.images[index], strict=True):
        _grey(axis, image, NAMES[name])

    _grey(axes[1, 0], flair, "truth, outlined" if truth.any() else "truth: no lesion")
    _outline(axes[1, 0], truth, TRUTH)

    _bare(axes[1, 1], "anomaly map")
    anomaly = axes[1, 1].imshow(
        ours.maps[index], cmap="inferno", vmin=0, vmax=_brightest(findings), interpolation="nearest"
    )
    place = axes[1, 1].inset_axes((0, -0.08, 1, 0.04))
    bar = figure.colorbar(anomaly, cax=place, orientation="horizontal", extend="max")
    bar.set_label(EVIDENCE[findings.about.get("evidence", "error")], fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(nbins=4)

    _grey(axes[1, 2], flair, "predicted mask" if mask.any() else "predicted mask: empty")
    _overlay(axes[1, 2], mask, MASK, 0.5)
    _outline(axes[1, 2], mask, MASK)

    _grey(axes[1, 3], flair, "truth and mask")
    for (name, (colour, at, side)), pixels in zip(
        PARTS.items(), (truth & mask, truth & ~mask, mask & ~truth), strict=True
    ):
        _overlay(axes[1, 3], pixels, colour, 0.75)
        axes[1, 3].annotate(
            f"■ {name}", (at, -0.04), xycoords="axes fraction", color=colour, fontsize=8, va="top", ha=side
        )

    known = overlap(findings, index)
    label = f"lesion of {known.truth} pixels" if truth.any() else "no lesion"
    result = f"{verdict(findings, index)}; Dice {known.dice:.2f}"
    figure.suptitle(f"{where(findings, index)}: {label}\n{result}", fontsize=11, parse_math=False)
    return figure


def _bare(axis: Any, title: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def _grey(axis: Any, image: NDArray[Any], title: str) -> None:
    _bare(axis, title)
    axis.imshow(image.astype(np.float32), cmap="gray", vmin=0, interpolation="nearest")


def _overlay(axis: Any, pixels: NDArray[np.bool_], colour: str, alpha: float) -> None:
    from matplotlib.colors import to_rgba

    layer = np.zeros((*pixels.shape, 4))
    layer[pixels] = to_rgba(colour, alpha)
    axis.imshow(layer, interpolation="nearest")


def _outline(axis: Any, pixels: NDArray[np.bool_], colour: str) -> None:
    """Along the edges of the pixels, and so exact however coarse they are."""
    from matplotlib.collections import LineCollection

    padded = np.pad(pixels, 1)
    y, x = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([np.stack([x, y - 1], -1), np.stack([x, y], -1)], 1)
    y, x = np.nonzero(padded[1:] != padded[:-1])
    level = np.stack([np.stack([x - 1, y], -1), np.stack([x, y], -1)], 1)
    edges = list(np.concatenate([upright, level]) - 0.5)
    axis.add_collection(LineCollection(edges, colors=colour, linewidths=1.2))


def _brightest(findings: Findings) -> float:
    """Where the colours of anomaly maps end, the same for all slices: all but few of the brain pixels are below."""
    step = -(-len(findings.slices) // 500)
    values = findings.ours.maps[::step][findings.slices.foreground[::step]]
    values = values[np.isfinite(values)]
    return float(np.quantile(values, 0.999)) if values.size and values.max() > 0 else 1.0


def curves(findings: Findings, index: int) -> Figure:
    """One slice's M_t with its end steps, and below the errors of both predictions."""
    from matplotlib.figure import Figure

    seen = findings.curves
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for m, modality in enumerate(seen.modalities):
        name, colour = NAMES.get(modality, modality), f"C{m}"
        values, end = seen.difference[index, :, m], seen.end[index, m]
        t = seen.timesteps[end]
        above.plot(seen.timesteps, values, color=colour, label=f"{name}: largest at t = {t}")
        above.plot([t], [values[end]], "o", color=colour, markersize=6)
        for axis in (above, below):
            axis.axvline(t, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
        below.plot(seen.timesteps, seen.healthy[index, :, m], color=colour, label=f"{name}: MSE_h, predicted healthy")
        below.plot(
            seen.timesteps, seen.null[index, :, m], color=colour, linestyle=":", label=f"{name}: MSE_0, without a class"
        )
    label = "with a lesion" if findings.slices.truth[index].any() else "without lesion"
    above.set(ylabel="M_t: healthy prediction to\nthe one without a class (MSE)")
    above.set_title(f"{where(findings, index)}, {label}\n{verdict(findings, index)}", fontsize=11, parse_math=False)
    below.set(xlabel="timestep t (noise grows to the right)", ylabel="prediction to\nthe slice itself (MSE)")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        _legend(axis)
    return figure


def all_curves(findings: Findings) -> Figure:
    """M_t of healthy and unhealthy slices: mean, and the half of the slices in the middle."""
    from matplotlib.figure import Figure

    seen, labels = findings.curves, findings.slices.labels
    figure = Figure(figsize=(max(8, 3.3 * len(seen.modalities)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(seen.modalities), sharey=True, squeeze=False)[0]
    for m, (axis, modality) in enumerate(zip(axes, seen.modalities, strict=True)):
        for name, colour, chosen in (("healthy", HEALTHY, ~labels), ("unhealthy", UNHEALTHY, labels)):
            values = seen.difference[chosen, :, m]
            values = values[np.isfinite(values).all(axis=1)]
            if len(values):
                low, high = np.quantile(values, (0.25, 0.75), axis=0)
                axis.fill_between(seen.timesteps, low, high, color=colour, alpha=0.2, linewidth=0)
                axis.plot(seen.timesteps, values.mean(axis=0), color=colour, label=f"{name} ({len(values)} slices)")
        axis.set(xlabel="timestep t", title=NAMES.get(modality, modality))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[0].set(ylabel="M_t (mean squared difference)")
    if axes[0].lines:
        title = "line: mean; band: the middle half of the slices"
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, title=title, fontsize=9
        )
    else:
        _say(axes[0], "no finite values")
    return figure


def roc_pr(findings: Findings) -> Figure:
    """Left the ROC of whole slices, right precision and recall of the pixels of unhealthy slices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4 + 0.2 * len(findings.methods)), layout="constrained")
    left, right = (half.subplots() for half in figure.subfigures(1, 2, squeeze=False)[0])
    _roc(left, findings)
    _precision_recall(right, findings)
    left.set(xlabel="false positive rate", ylabel="true positive rate", title="Slices: which have a lesion?")
    right.set(xlabel="recall", ylabel="precision", title="Brain pixels of unhealthy slices: which are lesion?")
    for axis in (left, right):
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    return figure


def _roc(axis: Any, findings: Findings) -> None:
    from sklearn.metrics import auc, roc_curve

    labels = findings.slices.labels
    if labels.all() or not labels.any():
        return _say(axis, f"no ROC: {'every' if labels.any() else 'no'} slice\nhas a lesion")
    for i, method in enumerate(findings.methods):
        if np.isfinite(method.scores).all():
            false, true, _ = roc_curve(labels, method.scores)
            axis.plot(*_thin(false, true), label=f"{method.name}: AUROC {auc(false, true):.3f}", **_style(i))
        else:
            axis.plot([], [], label=f"{method.name}: scores are not finite", **_style(i))
    axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="chance: AUROC 0.500")
    _legend(axis, below=True)


def _precision_recall(axis: Any, findings: Findings) -> None:
    from sklearn.metrics import precision_recall_curve

    labels = findings.slices.labels
    foreground = findings.slices.foreground[labels]
    truth = findings.slices.truth[labels][foreground]
    if not truth.any():
        return _say(axis, "no curve: no lesion in any slice")
    for i, method in enumerate(findings.methods):
        values = method.maps[labels][foreground]
        if np.isfinite(values).all():
            precision, recall, _ = precision_recall_curve(truth, values)
            area = -np.sum(np.diff(recall) * precision[:-1])  # average precision, as scikit-learn defines it
            axis.plot(*_thin(recall, precision), label=f"{method.name}: AUPRC {area:.3f}", **_style(i))
        else:
            axis.plot([], [], label=f"{method.name}: maps are not finite", **_style(i))
    share = truth.mean()
    axis.axhline(share, color="0.5", linestyle=":", label=f"chance: AUPRC {share:.3f}, the share of lesion")
    _legend(axis, below=True)


def _style(i: int) -> dict[str, Any]:
    """Of method i: the translation stands out."""
    return {"color": f"C{i}", "linewidth": 1.4 if i else 2.2, "zorder": 2 if i else 3}


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most POINTS of the points, evenly along the curve, with both ends."""
    if len(x) <= POINTS:
        return x, y
    way = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], POINTS - 1)))
    kept = np.unique([*kept, len(x) - 1])
    return x[kept], y[kept]


def scores(findings: Findings) -> Figure:
    """How often which score occurs among healthy and unhealthy slices, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    values, labels = findings.ours.scores.astype(np.float64), findings.slices.labels
    finite = np.isfinite(values)
    if not finite.any():
        _say(axis, "no finite score")
        return figure
    known = values[finite]
    if np.isfinite(findings.threshold):
        known = np.append(known, findings.threshold)
    low, high = known.min(), known.max()
    logarithmic = low > 0 and high > 100 * low
    if low == high:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    bins = np.geomspace(low, high, 41) if logarithmic else np.linspace(low, high, 41)
    bins[0], bins[-1] = low, high  # whatever rounding did
    for name, colour, chosen in (("healthy", HEALTHY, ~labels), ("unhealthy", UNHEALTHY, labels)):
        if chosen.any():
            label = f"{name} ({chosen.sum()} slices)"
            axis.hist(
                values[chosen & finite], bins.tolist(), color=colour, alpha=0.55, histtype="stepfilled", label=label
            )
    if np.isfinite(findings.threshold):
        axis.axvline(findings.threshold, color="black", linestyle="--", label=f"threshold {findings.threshold:.3g}")
    if logarithmic:
        axis.set_xscale("log")
    axis.set(ylabel="slices", xlabel="score (a slice right of the threshold is called unhealthy)")
    axis.locator_params(axis="y", integer=True)
    axis.grid(alpha=0.3)
    if not finite.all():
        axis.plot([], [], " ", label=f"{(~finite).sum()} scores are not finite")
    _legend(axis)
    return figure


def _legend(axis: Any, *, below: bool = False) -> None:
    """Where there is room, or below the axis and its label."""
    handles = axis.get_legend_handles_labels()
    legend = axis.figure.legend(*handles, loc="outside lower center") if below else axis.legend(loc="best", fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=13, color="0.35")
