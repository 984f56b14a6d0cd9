"""What a translation leaves for evaluation, pictures and files: plain arrays over the S slices of a split.

Arrays are in the order of the split (patient by patient, foot to head). H and W are the model's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .simulate import MODALITIES


@dataclass(frozen=True)
class Slices:
    """The input, and what is known about it."""

    split: str
    """"train", "val" or "test"."""
    patients: tuple[str, ...]
    """Names."""
    patient: NDArray[np.int64]
    """[S] index into `patients`."""
    slices: NDArray[np.int64]
    """[S] axial index in the patient's volume."""
    images: NDArray[np.float16]
    """[S, 4, H, W] as prepared: in units of the volume's 99th percentile, zero outside the brain."""
    truth: NDArray[np.bool_]
    """[S, H, W] lesion pixels."""
    foreground: NDArray[np.bool_]
    """[S, H, W] brain pixels; the rest counts in no figure."""

    @property
    def labels(self) -> NDArray[np.bool_]:
        """[S] whether a slice has a lesion."""
        return np.asarray(self.truth.any(axis=(1, 2)))

    def __len__(self) -> int:
        return len(self.patient)


@dataclass(frozen=True)
class Method:
    """What one method says about the slices of a split."""

    name: str
    """As tables and legends show it."""
    scores: NDArray[np.float32]
    """[S] how likely a slice is unhealthy: higher is more likely."""
    maps: NDArray[np.float32]
    """[S, H, W] how likely a pixel is."""
    unhealthy: NDArray[np.bool_]
    """[S] its verdict."""
    masks: NDArray[np.bool_]
    """[S, H, W] its segmentation; empty where the slice is held to be healthy."""


@dataclass(frozen=True)
class Curves:
    """What the translation saw on its way, per slice, step and modality (those of `modalities`)."""

    timesteps: NDArray[np.int64]
    """[F] of the forward process."""
    modalities: tuple[str, ...]
    difference: NDArray[np.float32]
    """[S, F, M] M_t: mean squared difference of the guided and the unguided prediction."""
    healthy: NDArray[np.float32]
    """[S, F, M] mean squared error of the guided (healthy) prediction to the input."""
    null: NDArray[np.float32]
    """[S, F, M] the same of the unguided one."""
    end: NDArray[np.int64]
    """[S, M] the step (an index into `timesteps`) at which M_t is largest."""


class Interval(NamedTuple):
    """A figure with its 95% bootstrap interval (NaN where it is not defined)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """The figures of one method on one set of slices."""

    method: str
    subset: str
    """"all slices" or "unhealthy slices"."""
    figures: dict[str, Interval]
    """By name: "image AUROC", "pixel AUPRC", "pixel AUROC", "Dice", "IoU", "precision", "recall"."""


@dataclass(frozen=True)
class Findings:
    """All that a report shows."""

    slices: Slices
    methods: tuple[Method, ...]
    """The translation first, then the baselines (chance is in the rows alone)."""
    curves: Curves
    rows: tuple[Row, ...]
    threshold: float
    """Of the translation's score: a slice with a higher one is called unhealthy."""
    about: dict[str, Any] = field(default_factory=dict)
    """What determined the result, name to value, in the order to show: weights, data, settings, versions, date."""

    @property
    def ours(self) -> Method:
        """The translation."""
        return self.methods[0]


__all__ = ["MODALITIES", "Curves", "Findings", "Interval", "Method", "Row", "Slices"]
