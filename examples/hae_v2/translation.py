"""Anomaly segmentation by the forward process alone: AnoFPDM (arXiv 2404.15683).

The input is noised step by step, t = 0 .. F - 1, by deterministic DDIM inversion without a condition. At each step the
model predicts the image behind the noise twice, as a healthy one with guidance w and without a condition. Where tissue
is healthy both agree with the input; where it is not, the healthy prediction departs from it, the more the further the
noise hides the lesion, until it hides the anatomy, too. Per modality,

- M_t is the mean squared difference of the two predictions; the end step t_e is where it is largest;
- S_t is the squared error of the healthy prediction to the input, per pixel; its mean over the steps up to t_e is the
  anomaly map, averaged over modalities and smoothed by a 5 x 5 median;
- MSE_h and MSE_0 are the mean squared errors of the two predictions over the steps: for a healthy slice they run alike,
  so how they part is the slice's score.

One call of the model per step, on twice the slices, serves both predictions and the inversion, for any number of
guidance strengths at once, because w takes no part in either. Of the maps only their sum so far, and the sum as it was
at the largest M_t so far are kept: memory does not depend on F. (`end_ratio` below 1 needs sums of the past: the one
option that keeps some, in host memory.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memopt.errors import InputError, MemoptError

from .diffusion import Diffusion, guide

HEALTHY = 0
"""The class that slices are translated to."""
QUANTILES = np.linspace(0.98, 0.90, 101)
"""Quantile of a slice's map from which on it is lesion, from the smallest M to the largest."""
DYNAMIC = 0.995
"""The quantile of |x_0| that dynamic clipping clips to (Imagen, arXiv 2205.11487, section 2.3)."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The algorithm's settings; the defaults are the paper's, the others its ablations."""

    steps: int = 600
    """F: calls of the model, evenly spread over the timesteps below `until`."""
    until: int = 600
    """The noise ends before this timestep."""
    encoding: Literal["ddim", "noise"] = "ddim"
    """How a slice is noised: by DDIM inversion, or by fresh noise at each step (stochastic encoding)."""
    clipping: Literal["static", "dynamic"] = "static"
    """Predictions are clipped to [-1, 1]; dynamic: divided by a high quantile of theirs first, where that exceeds 1."""
    evidence: Literal["error", "gradient"] = "error"
    """What the map sums: S_t, or the size of the gradient of M_t at each noisy pixel."""
    last_only: bool = False
    """The map is that of the end step alone, not the mean up to it."""
    interval: int = 1
    """The map takes only each k-th step."""
    end_ratio: float = 1.0
    """The map ends at this share of the way to the end step."""

    def __post_init__(self) -> None:
        checks = {
            "steps must be at least 1": self.steps >= 1,
            f"until={self.until} leaves no room for steps={self.steps}": self.until >= self.steps,
            "interval must be at least 1": self.interval >= 1,
            "end_ratio must be above 0 and at most 1": 0 < self.end_ratio <= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise InputError(message)

    @property
    def timesteps(self) -> list[int]:
        """Of the forward process, one for each step."""
        return [k * self.until // self.steps for k in range(self.steps)]


@dataclass(frozen=True)
class Translated:
    """N slices, translated with one guidance strength; F steps, M modalities."""

    map: NDArray[np.float32]
    """[N, H, W] anomaly."""
    peak: NDArray[np.float32]
    """[N] the largest M_t, averaged over modalities."""
    end: NDArray[np.int64]
    """[N, M] the step of the largest M_t."""
    difference: NDArray[np.float32]
    """[N, F, M] M_t."""
    healthy: NDArray[np.float32]
    """[N, F, M] MSE_h."""
    null: NDArray[np.float32]
    """[N, F, M] MSE_0."""


class Evidence:
    """The running sums of one guidance strength."""

    def __init__(self, method: Algorithm, n: int, modalities: int) -> None:
        self.method = method
        self.curves = np.empty((3, n, method.steps, modalities), np.float32)
        self._sum: Tensor | None = None
        self._count = 0
        self._best: Tensor | None = None
        self._map: Tensor | None = None
        self._past: deque[tuple[Tensor, int]] = deque()

    def add(self, step: int, difference: Tensor, healthy: Tensor, null: Tensor, pixels: Tensor) -> None:
        """What step `step` showed: M_t, MSE_h and MSE_0 [N, M], and the pixels' evidence [N, M, H, W]."""
        self.curves[:, :, step] = torch.stack([difference, healthy, null]).float().cpu().numpy()
        if self._sum is None or self.method.last_only:
            self._sum, self._count = pixels, 1
        elif step % self.method.interval == 0:
            self._sum, self._count = self._sum + pixels, self._count + 1
        total, count = self._until(step)
        mean = total / count
        if self._best is None or self._map is None:
            self._best, self._map = difference, mean
        else:
            better = difference > self._best
            self._best = torch.where(better, difference, self._best)
            self._map = torch.where(better[..., None, None], mean, self._map)

    def _until(self, step: int) -> tuple[Tensor, int]:
        """The sum that the map has if its end is this step, and of how many steps it is."""
        assert self._sum is not None
        ratio = self.method.end_ratio
        if ratio == 1:
            return self._sum, self._count
        self._past.append((self._sum.cpu(), self._count))
        wanted = max(1, round(ratio * (step + 1)))
        while len(self._past) > step + 2 - wanted:  # those before can never be wanted again
            self._past.popleft()
        total, count = self._past[0]
        return total.to(self._sum.device), count

    def result(self) -> Translated:
        """After the last step."""
        assert self._map is not None
        difference, healthy, null = self.curves
        if not np.isfinite(self.curves).all():
            raise MemoptError("the model's predictions are not finite: these weights cannot be used")
        end = difference.argmax(axis=1)
        return Translated(
            map=smooth(self._map.mean(dim=1).float().cpu().numpy()),
            peak=difference.max(axis=1).mean(axis=1),
            end=end,
            difference=difference,
            healthy=healthy,
            null=null,
        )


def smooth(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps [N, H, W] after a 5 x 5 median."""
    from scipy.ndimage import median_filter

    return np.asarray(median_filter(maps, size=(1, 5, 5)))


Score = Literal["cosine", "ratio", "difference"]


def judge(difference: NDArray[Any], healthy: NDArray[Any], null: NDArray[Any], score: Score) -> NDArray[np.float32]:
    """How unhealthy slices look, [...], from M_t, MSE_h and MSE_0 [..., F, M], averaged over modalities.

    `cosine` is 1 minus the cosine of MSE_h and MSE_0, the paper's. It is the late steps', whose errors are the largest;
    where a model has learned little of its classes, they hold nothing but anatomy that the noise has hidden. `ratio` is
    the mean of log(MSE_h / MSE_0), in which all steps weigh the same: by how much the healthy prediction is the worse
    one. `difference` is the mean of M_t: how far the class alone moves the prediction.
    """
    if score == "difference":
        return np.asarray(difference.astype(np.float64).mean(axis=(-2, -1)), dtype=np.float32)
    a, b = (x.astype(np.float64).mean(axis=-1) for x in (healthy, null))
    if score == "ratio":
        known = (a > 0) & (b > 0)
        logs = np.log(np.where(known, a, 1) / np.where(known, b, 1))
        return np.asarray(logs.mean(axis=-1), dtype=np.float32)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    found = np.where(norms > 0, 1 - (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1), 0)
    return np.asarray(found, dtype=np.float32)


@dataclass(frozen=True)
class Batch:
    """What `translate` returns."""

    by_guidance: tuple[Translated, ...]
    """One for each guidance strength."""
    encoded: Tensor
    """[N, C, H, W] the slices at the last timestep."""


def translate(
    model: nn.Module,
    images: Tensor,
    guidance: Sequence[float],
    method: Algorithm,
    *,
    diffusion: Diffusion,
    modalities: Sequence[int],
    generators: Sequence[torch.Generator] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Batch:
    """Translate slices [N, C, H, W] in [-1, 1] to healthy ones: `method.steps` calls of the model, each on 2 N.

    Args:
        model: called as `HAEUNetModelV2` is, in evaluation mode.
        images: on the model's device.
        guidance: strengths w, all served by the same calls.
        method: the settings.
        diffusion: the noise schedule that the model was trained with.
        modalities: the channels that count.
        generators: one for each slice, of the noise that `encoding="noise"` adds: no slice's depends on the others.
        progress: called as progress(done, steps) after each call.
    """
    if method.until > diffusion.steps:
        raise InputError(f"until={method.until} is beyond the {diffusion.steps} steps of the model's diffusion")
    n, channels = len(images), list(modalities)
    labels = torch.full((n,), HEALTHY, device=images.device)
    target = images[:, channels]
    kept = [Evidence(method, n, len(channels)) for _ in guidance]
    timesteps = method.timesteps
    gradient = method.evidence == "gradient"
    x, eps_0 = images, torch.zeros(())
    with torch.set_grad_enabled(gradient):
        for step, timestep in enumerate(timesteps):
            if method.encoding == "noise":
                x = diffusion.noise(images, torch.full((n,), timestep), _noise(generators, images))
            elif step:
                x = diffusion.move(x, timesteps[step - 1], eps_0, timestep)
            x = x.detach().requires_grad_(gradient)
            eps_h, eps_0 = diffusion.predict_both(model, x, torch.full((n,), timestep, device=x.device), labels)
            if gradient and not eps_h.requires_grad:
                raise InputError("evidence=gradient needs autograd: leave the pass inference_mode out of --passes")
            null = _clip(diffusion.image(x, timestep, eps_0), method)[:, channels]
            for i, (w, evidence) in enumerate(zip(guidance, kept, strict=True)):
                healthy = _clip(diffusion.image(x, timestep, guide(eps_h, eps_0, w)), method)[:, channels]
                difference = (healthy - null).square().mean(dim=(2, 3))
                pixels = (healthy - target).square()
                error, null_error = pixels.mean(dim=(2, 3)), (null - target).square().mean(dim=(2, 3))
                if gradient:
                    pixels = _gradient(difference, x, last=i == len(kept) - 1)[:, channels]
                evidence.add(step, *(t.detach() for t in (difference, error, null_error, pixels)))
            eps_0 = eps_0.detach()
            if progress is not None:
                progress(step + 1, method.steps)
    return Batch(tuple(evidence.result() for evidence in kept), x.detach())


def _noise(generators: Sequence[torch.Generator], images: Tensor) -> Tensor:
    if len(generators) != len(images):
        raise ValueError(f"{len(images)} slices need as many generators, got {len(generators)}")
    return torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators]).to(images)


def _clip(x0: Tensor, method: Algorithm) -> Tensor:
    if method.clipping == "dynamic":
        limit = torch.quantile(x0.detach().abs().flatten(1), DYNAMIC, dim=1).clamp(min=1)[:, None, None, None]
        return x0.clamp(-limit, limit) / limit
    return x0.clamp(-1, 1)


def _gradient(difference: Tensor, x: Tensor, last: bool) -> Tensor:
    (gradient,) = torch.autograd.grad(difference.sum(), x, retain_graph=not last)
    return gradient.abs()


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    encoded: Tensor,
    guidance: float,
    method: Algorithm,
    *,
    diffusion: Diffusion,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The healthy images [N, C, H, W] in [-1, 1] that encoded slices decode to: F more calls, for comparison only.

    After DDIB (arXiv 2203.08382): encoded without a condition, decoded as healthy, with guidance, by DDIM.
    """
    x, timesteps = encoded, method.timesteps
    labels = torch.full((len(x),), HEALTHY, device=x.device)
    for step in reversed(range(method.steps)):
        now = torch.full((len(x),), timesteps[step], device=x.device)
        eps, _ = diffusion.predict(model, x, now, labels, guidance)
        x = diffusion.move(x, timesteps[step], eps, timesteps[step - 1]) if step else diffusion.image(x, 0, eps)
        if progress is not None:
            progress(method.steps - step, method.steps)
    return x.clamp(-1, 1)


def segment(
    maps: NDArray[np.float32], unhealthy: NDArray[np.bool_], peak: NDArray[np.float32], largest: float
) -> NDArray[np.bool_]:
    """The lesion [N, H, W] in the maps of unhealthy slices: the part above a quantile that falls as M_te rises.

    Args:
        maps: anomaly [N, H, W].
        unhealthy: [N] which slices have a lesion; the others' masks are empty.
        peak: M_te [N].
        largest: the largest M_te to be expected, from the validation split.
    """
    share = np.clip(peak / largest, 0, 1)
    index = np.rint(np.round(share, 2) * 100).astype(int)
    masks = np.zeros(maps.shape, np.bool_)
    for i in np.flatnonzero(unhealthy):
        masks[i] = maps[i] >= np.quantile(maps[i], QUANTILES[index[i]])
    return masks
