"""Figures of a segmentation, each with a 95% interval, and the choices that a validation split makes for it.

Point figures are scikit-learn's. Intervals are percentiles of a bootstrap over patients: slices of one patient resemble
each other, so resampling slices would promise too much. Each resample weighs patients by how often it drew them; a rank
figure is then a sum over a histogram of scores per patient, in at most `BINS` bins of equal mass, which is exact where
there are fewer distinct scores, and makes a thousand resamples of millions of pixels a matter of seconds.

What is chosen is chosen from image labels alone: the masks of the validation split are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputError

from .results import Interval, Method, Row, Slices

BINS = 2000
SMALLEST = 40
"""Components of fewer pixels at 128 x 128 are no lesions, but noise; at other sizes in proportion to the area."""
BRIGHT = 99
"""A map's score of a slice, where a method has no other, is this percentile of the map over the brain."""
Array = NDArray[Any]


class Threshold(NamedTuple):
    """A choice from image labels."""

    value: float
    """A slice with a higher score is called unhealthy."""
    auroc: float
    """How well the scores separate the validation split."""
    margin: float
    """Distance of the two classes' mean scores, in standard deviations within them."""


def choose_threshold(scores: Array, labels: Array, what: str = "validation") -> Threshold:
    """The threshold with the largest sensitivity + specificity - 1 (Youden), in the middle of its gap.

    Raises:
        InputError: the split has no healthy or no unhealthy slice.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    for name, there in (("healthy", not labels.all()), ("unhealthy", bool(labels.any()))):
        if not there:
            raise InputError(
                f"the {what} split has {len(labels)} slices and none is {name}: a threshold needs both kinds; use more "
                "patients, or another data_seed, which splits them in another way"
            )
    false, true, at = roc_curve(labels, scores, drop_intermediate=False)
    cut = at[np.argmax(true - false)]  # infinite where no threshold is better than calling every slice healthy
    below, above = scores[scores < cut], scores[scores >= cut]
    if not len(above):
        value = below.max()
    elif not len(below):
        value = np.nextafter(above.min(), -np.inf)
    else:
        value = (float(below.max()) + float(above.min())) / 2
    sick, well = scores[labels], scores[~labels]
    spread = float(np.sqrt((sick.var() + well.var()) / 2))
    margin = float(sick.mean() - well.mean()) / spread if spread > 0 else 0.0
    return Threshold(float(value), float(roc_auc_score(labels, scores)), margin)


def drop_small(masks: NDArray[np.bool_], smallest: float | None = None) -> NDArray[np.bool_]:
    """Masks [N, H, W] without their connected components (also over corners) of fewer than `smallest` pixels."""
    from scipy.ndimage import label

    limit = SMALLEST * masks[0].size / 128**2 if smallest is None else smallest
    kept = np.zeros_like(masks)
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        pieces, count = label(masks[i], np.ones((3, 3)))
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        sizes[0] = 0
        kept[i] = (sizes >= limit)[pieces]
    return kept


def map_scores(maps: NDArray[np.float32], foreground: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[N] how high each map [N, H, W] goes within the brain: its `BRIGHT` percentile there."""
    found = [np.percentile(m[f], BRIGHT) if f.any() else m.min() for m, f in zip(maps, foreground, strict=True)]
    return np.asarray(found, np.float32)


def by_threshold(name: str, maps: NDArray[np.float32], slices: Slices, threshold: float) -> Method:
    """The method that calls lesion what lies above one threshold of the map, and unhealthy a slice that reaches it."""
    scores = map_scores(maps, slices.foreground)
    unhealthy = scores > threshold
    masks = (maps > threshold) & slices.foreground & unhealthy[:, None, None]
    return Method(name, scores, maps, unhealthy, drop_small(masks))


def evaluate(methods: Iterable[Method], slices: Slices, *, resamples: int = 1000, seed: int = 0) -> tuple[Row, ...]:
    """The table: each method on all slices and on unhealthy ones; then chance, whose precision is the prevalence.

    Dice and IoU are means over slices, where two empty masks agree (1); precision and recall are those of all pixels
    together; pixels count within the brain.
    """
    rng = np.random.default_rng(seed)
    count = len(slices.patients)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), drawn])  # the first is the split itself
    subsets = {"all slices": np.ones(len(slices), bool), "unhealthy slices": slices.labels}
    rows = []
    for method in methods:
        for subset, taken in subsets.items():
            rows.append(Row(method.name, subset, _figures(method, slices, taken, weights, subset == "all slices")))
    for subset, taken in subsets.items():
        rows.append(Row("chance", subset, _chance(slices, taken, weights, subset == "all slices")))
    return tuple(rows)


def _figures(method: Method, slices: Slices, taken: Array, weights: Array, every: bool) -> dict[str, Interval]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    figures: dict[str, Interval] = {}
    labels, patient, count = slices.labels, slices.patient, len(slices.patients)
    if every:
        ranks = _ranks(method.scores, labels, patient, count)
        exact = roc_auc_score(labels, method.scores) if 0 < labels.sum() < len(labels) else np.nan
        figures["image AUROC"] = _interval(_auroc(ranks, weights), exact)
    inside = slices.foreground & taken[:, None, None]
    scores, truth = method.maps[inside], slices.truth[inside]
    owner = np.broadcast_to(patient[:, None, None], inside.shape)[inside]
    ranks = _ranks(scores, truth, owner, count)
    both = bool(truth.any()) and not truth.all()
    figures["pixel AUPRC"] = _interval(
        _auprc(ranks, weights), average_precision_score(truth, scores) if both else np.nan
    )
    figures["pixel AUROC"] = _interval(_auroc(ranks, weights), roc_auc_score(truth, scores) if both else np.nan)
    masks, lesion = method.masks & inside, slices.truth & inside
    hit, found, real = ((m).sum(axis=(1, 2)) for m in (masks & lesion, masks, lesion))
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = np.where(found + real > 0, 2 * hit / (found + real), 1.0)
        iou = np.where(found + real > 0, hit / (found + real - hit), 1.0)
        of = {name: _by_patient(v * taken, patient, count) for name, v in (("dice", dice), ("iou", iou))}
        sums = {name: _by_patient(v, patient, count) for name, v in (("hit", hit), ("found", found), ("real", real))}
        number = weights @ _by_patient(taken, patient, count)
        for name, top, bottom in (
            ("Dice", weights @ of["dice"], number),
            ("IoU", weights @ of["iou"], number),
            ("precision", weights @ sums["hit"], weights @ sums["found"]),
            ("recall", weights @ sums["hit"], weights @ sums["real"]),
        ):
            figures[name] = _interval(top / bottom)
    return figures


def _chance(slices: Slices, taken: Array, weights: Array, every: bool) -> dict[str, Interval]:
    inside, count = slices.foreground & taken[:, None, None], len(slices.patients)
    lesion = _by_patient((slices.truth & inside).sum(axis=(1, 2)), slices.patient, count)
    pixels = _by_patient(inside.sum(axis=(1, 2)), slices.patient, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        prevalence = _interval((weights @ lesion) / (weights @ pixels))
    half = Interval(0.5, 0.5, 0.5)
    return ({"image AUROC": half} if every else {}) | {"pixel AUPRC": prevalence, "pixel AUROC": half}


def _by_patient(values: Array, patient: Array, count: int) -> NDArray[np.float64]:
    return np.asarray(np.bincount(patient, weights=values.astype(np.float64), minlength=count), np.float64)


def _interval(sampled: NDArray[np.float64], exact: float | None = None) -> Interval:
    """From the figure itself, first, and of the resamples; those where it is not defined are left out."""
    value = float(sampled[0] if exact is None else exact)
    defined = sampled[1:][np.isfinite(sampled[1:])]
    if not len(defined) or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _ranks(scores: Array, truth: Array, patient: Array, count: int) -> NDArray[np.float64]:
    """Histograms [2, count, bins], of negatives and of positives, from the highest scores down."""
    edges: Sequence[Any] | Array = np.unique(scores)
    if len(edges) > BINS:
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1)[1:]))
    bins = max(1, len(edges))
    place = bins - 1 - np.searchsorted(edges, scores)
    flat = (truth.astype(np.int64) * count + patient) * bins + place
    return np.bincount(flat, minlength=2 * count * bins).reshape(2, count, bins).astype(np.float64)


def _auroc(ranks: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B]: the chance that a positive is above a negative, ties half."""
    negative, positive = weights @ ranks[0], weights @ ranks[1]
    above = np.cumsum(positive, axis=1) - positive / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((negative * above).sum(axis=1) / (negative.sum(axis=1) * positive.sum(axis=1)))


def _auprc(ranks: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B]: average precision."""
    negative, positive = weights @ ranks[0], weights @ ranks[1]
    hits = np.cumsum(positive, axis=1)
    called = hits + np.cumsum(negative, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(called > 0, hits / called, 0)
        return np.asarray((positive * precision).sum(axis=1) / positive.sum(axis=1))
