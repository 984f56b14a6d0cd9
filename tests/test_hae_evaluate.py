"""Figures and intervals of the evaluation, and what validation chooses."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, jaccard_score, precision_score, recall_score, roc_auc_score

from examples.hae_v2.evaluate import by_threshold, choose_threshold, drop_small, evaluate, map_scores
from examples.hae_v2.results import Method, Slices
from memopt.errors import InputError

SIZE = 24


def made(patients=5, per_patient=6, seed=0, healthy=0.4, distinct=None):
    """Slices with square lesions, and a method whose map is brighter there."""
    rng = np.random.default_rng(seed)
    n = patients * per_patient
    truth = np.zeros((n, SIZE, SIZE), bool)
    for i in np.flatnonzero(rng.random(n) >= healthy):
        top, left = rng.integers(2, SIZE - 9, 2)
        truth[i, top : top + 6, left : left + 6] = True
    foreground = np.zeros_like(truth)
    foreground[:, 1:-1, 1:-1] = True
    maps = (rng.random(truth.shape) + 0.5 * truth).astype(np.float32)
    if distinct:
        maps = np.round(maps * distinct) / distinct
    slices = Slices(
        split="test",
        patients=tuple(f"p{i}" for i in range(patients)),
        patient=np.repeat(np.arange(patients), per_patient),
        slices=np.tile(np.arange(per_patient), patients),
        images=rng.random((n, 4, SIZE, SIZE)).astype(np.float16),
        truth=truth,
        foreground=foreground,
    )
    scores = (rng.random(n) + truth.any(axis=(1, 2))).astype(np.float32)
    unhealthy = scores > 0.9
    return slices, Method("ours", scores, maps, unhealthy, (maps > 0.9) & unhealthy[:, None, None])


def rows(slices, method, **more):
    return {(r.method, r.subset): r.figures for r in evaluate([method], slices, **more)}


@pytest.mark.parametrize("distinct", [None, 50])
def test_figures_are_those_of_scikit_learn(distinct):
    slices, method = made(distinct=distinct)
    table = rows(slices, method, resamples=20)
    assert list(table) == [
        ("ours", "all slices"),
        ("ours", "unhealthy slices"),
        ("chance", "all slices"),
        ("chance", "unhealthy slices"),
    ]
    for subset, taken in (("all slices", np.ones(len(slices), bool)), ("unhealthy slices", slices.labels)):
        inside = slices.foreground & taken[:, None, None]
        truth, found, scores = slices.truth[inside], method.masks[inside], method.maps[inside]
        figures = table["ours", subset]
        expected = {
            "pixel AUPRC": average_precision_score(truth, scores),
            "pixel AUROC": roc_auc_score(truth, scores),
            "precision": precision_score(truth, found),
            "recall": recall_score(truth, found),
        }
        dice, iou = [], []
        for i in np.flatnonzero(taken):
            a, b = method.masks[i] & inside[i], slices.truth[i] & inside[i]
            empty = not (a.any() or b.any())
            iou.append(1.0 if empty else jaccard_score(b.ravel(), a.ravel()))
            dice.append(1.0 if empty else 2 * (a & b).sum() / (a.sum() + b.sum()))
        expected |= {"Dice": np.mean(dice), "IoU": np.mean(iou)}
        for name, value in expected.items():
            assert figures[name].value == pytest.approx(value, abs=1e-12), (subset, name)
            assert figures[name].low <= figures[name].value <= figures[name].high
        chance = table["chance", subset]["pixel AUPRC"]
        assert chance.value == pytest.approx(truth.mean())
    assert table["ours", "all slices"]["image AUROC"].value == roc_auc_score(slices.labels, method.scores)
    assert "image AUROC" not in table["ours", "unhealthy slices"]


@pytest.mark.parametrize("distinct", [None, 40])
def test_intervals_are_those_of_a_plain_bootstrap_over_patients(distinct):
    slices, method = made(seed=3, distinct=distinct)
    count, resamples = len(slices.patients), 60
    drawn = np.random.default_rng(7).multinomial(count, np.full(count, 1 / count), size=resamples)
    found = {"image AUROC": [], "pixel AUPRC": [], "Dice": [], "recall": []}
    for weights in drawn:
        rows_ = np.concatenate([np.tile(np.flatnonzero(slices.patient == p), k) for p, k in enumerate(weights)])
        inside = slices.foreground[rows_]
        truth, masks = slices.truth[rows_], method.masks[rows_] & inside
        found["image AUROC"].append(roc_auc_score(slices.labels[rows_], method.scores[rows_]))
        found["pixel AUPRC"].append(average_precision_score(truth[inside], method.maps[rows_][inside]))
        found["recall"].append((masks & truth).sum() / truth.sum())
        both = masks.sum(axis=(1, 2)) + truth.sum(axis=(1, 2))
        dice = np.where(both > 0, 2 * (masks & truth).sum(axis=(1, 2)) / np.maximum(both, 1), 1)
        found["Dice"].append(dice.mean())
    figures = rows(slices, method, resamples=resamples, seed=7)["ours", "all slices"]
    for name, values in found.items():
        low, high = np.percentile(values, [2.5, 97.5])
        # Scores are put into 2,000 bins of equal mass where more of them differ.
        assert (figures[name].low, figures[name].high) == pytest.approx((low, high), abs=2e-3), name


def test_what_is_not_defined_is_nan_and_not_a_number():
    slices, method = made(healthy=1.0)
    figures = rows(slices, method, resamples=10)
    assert np.isnan(figures["ours", "all slices"]["image AUROC"].value)
    assert np.isnan(figures["ours", "unhealthy slices"]["pixel AUPRC"].value)
    assert np.isnan(figures["ours", "unhealthy slices"]["Dice"].value)
    assert figures["ours", "all slices"]["precision"].value == 0


def test_the_threshold_is_in_the_middle_of_the_gap():
    scores, labels = np.array([0.1, 0.2, 0.3, 0.7, 0.8]), np.array([False, False, False, True, True])
    found = choose_threshold(scores, labels)
    assert found.value == pytest.approx(0.5)
    assert found.auroc == 1
    assert found.margin > 5


@pytest.mark.parametrize("seed", range(20))
def test_no_other_threshold_is_better(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random(30) < 0.4
    labels[:2] = True, False
    scores = np.round(rng.random(30) + 0.3 * labels, 1 + seed % 2).astype(np.float32)

    def youden(at):
        called = scores > at
        return called[labels].mean() - called[~labels].mean()

    best = max(youden(at) for at in [-1.0, *np.unique(scores)])
    assert youden(choose_threshold(scores, labels).value) == pytest.approx(best)


@pytest.mark.parametrize(("label", "missing"), [(True, "healthy"), (False, "unhealthy")])
def test_a_split_with_one_kind_of_slices_is_refused(label, missing):
    with pytest.raises(InputError, match=rf"validation split has 4 slices and none is {missing}: .*another data_seed"):
        choose_threshold(np.arange(4.0), np.full(4, label))


def test_small_components_are_dropped_in_proportion_to_the_area():
    masks = np.zeros((2, 128, 128), bool)
    masks[0, :5, :8] = True  # 40 pixels
    masks[0, 20:23, 20:33] = True  # 39
    masks[0, 60, 60] = masks[0, 61, 61] = True  # two that touch at a corner
    assert drop_small(masks).sum(axis=(1, 2)).tolist() == [40, 0]
    assert drop_small(masks, 2).sum() == 40 + 39 + 2
    small = np.zeros((1, 32, 32), bool)  # 2.5 pixels there
    small[0, 0, :3] = small[0, 9, :2] = True
    assert drop_small(small).sum() == 3


def test_a_baseline_is_one_threshold_of_its_map():
    slices, method = made()
    scores = map_scores(method.maps, slices.foreground)
    at = float(np.median(scores))
    found = by_threshold("bright", method.maps, slices, at)
    assert np.array_equal(found.unhealthy, scores > at)
    assert not found.masks[~found.unhealthy].any()
    assert not (found.masks & ~slices.foreground).any()
    assert (method.maps[found.masks] > at).all()
