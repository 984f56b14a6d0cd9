"""Noise, loss and guided sampling: a thin layer on the schedulers of diffusers.

The forward process has 1000 linear steps by default (beta from 1e-4 to 0.02); the model predicts the noise. Sampling is
DDIM with classifier-free guidance, eps = (1 + w) eps_y - w eps_0, where eps_y is the prediction for
class y and eps_0 the one without a condition. Both come from one call of the model on a batch of twice the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Diffusion:
    """The noise schedule, the training loss and the sampler of one diffusion model.

    Args:
        steps: number of steps of the forward process; timesteps are 0 .. steps - 1.
        beta_start: noise of the first step.
        beta_end: noise of the last step; in between it rises linearly.
    """

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        from diffusers import DDPMScheduler  # importing diffusers takes over a second

        self.steps = steps
        self.scheduler: Any = DDPMScheduler(
            num_train_timesteps=steps, beta_start=beta_start, beta_end=beta_end, beta_schedule="linear"
        )

    def noise(self, x0: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        """x_t: the images x0 [N, C, H, W] after timesteps [N], with the noise eps [N, C, H, W]."""
        noised: Tensor = self.scheduler.add_noise(x0, eps, timesteps)
        return noised

    def loss(self, predicted: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error of the predicted noise for each sample, in at least float32: [N]."""
        wide = torch.promote_types(predicted.dtype, torch.float32)
        return (predicted.to(wide) - eps.to(wide)).square().flatten(1).mean(dim=1)

    def training_loss(self, model: nn.Module, x0: Tensor, timesteps: Tensor, eps: Tensor, **condition: Any) -> Tensor:
        """Loss of each sample [N]; `condition` goes to the model (y with threshold, or with clf_free and null)."""
        return self.loss(model(self.noise(x0, timesteps, eps), timesteps, **condition), eps)

    def image_weight(self, timesteps: Tensor) -> Tensor:
        """What makes of the noise's squared error the image's, 1 / SNR, at most 5, over the mean of that: [N].

        Salimans and Ho (arXiv 2202.00512, section 4) compare such weights.
        """
        alphas: Tensor = self.scheduler.alphas_cumprod
        weights = ((1 - alphas) / alphas).clamp(max=5)
        return (weights / weights.mean()).to(timesteps.device)[timesteps]

    def predict(
        self, model: nn.Module, x: Tensor, timesteps: Tensor, labels: Tensor | None, guidance: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Noise in x [N, C, H, W] with guidance and without a condition, from one call of the model.

        Args:
            model: called as `HAEUNetModelV2` is.
            x: noisy images.
            timesteps: [N].
            labels: classes [N], None for a model without classes (both results are then its prediction).
            guidance: w, one for all samples or [N].
        """
        eps_y, eps_0 = self.predict_both(model, x, timesteps, labels)
        if labels is None:
            return eps_0, eps_0
        w = torch.as_tensor(guidance, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
        return guide(eps_y, eps_0, w), eps_0

    def predict_both(
        self, model: nn.Module, x: Tensor, timesteps: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Noise in x [N, C, H, W] for the classes `labels` [N] and without a condition, from one call of the model."""
        if labels is None:
            eps = model(x, timesteps)
            return eps, eps
        n = x.shape[0]
        null = torch.arange(2 * n, device=x.device) >= n
        both = model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), labels.repeat(2), null=null, clf_free=True)
        eps_y, eps_0 = both.chunk(2)
        return eps_y, eps_0

    def signal(self, timestep: int) -> float:
        """Share of the variance that is still the image's at a timestep (alpha bar in DDPM)."""
        return float(self.scheduler.alphas_cumprod[timestep])

    def image(self, x: Tensor, timestep: int, eps: Tensor) -> Tensor:
        """The image x_0 that x_t [N, C, H, W] is, if eps is its noise (equation 12 of DDIM, first term)."""
        signal = self.signal(timestep)
        return (x - math.sqrt(1 - signal) * eps) / math.sqrt(signal)

    def move(self, x: Tensor, timestep: int, eps: Tensor, to: int) -> Tensor:
        """x at timestep `to`, by the deterministic step of DDIM in either direction (equation 12 with sigma = 0)."""
        signal = self.signal(to)
        return math.sqrt(signal) * self.image(x, timestep, eps) + math.sqrt(1 - signal) * eps

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        labels: Tensor | None,
        guidance: Tensor | Sequence[float] | float = 0.0,
        steps: int = 50,
        *,
        eta: float = 0.0,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw images by DDIM; the same generator state gives the same images.

        The model is in evaluation mode meanwhile. The starting noise is drawn on the generator's device, so that a CPU
        generator gives every device the same images to within rounding.

        Args:
            model: called as `HAEUNetModelV2` is, on batches of twice the size (where there are labels).
            labels: classes [N], or None for a model without classes.
            guidance: w, one for all samples or one for each.
            steps: number of DDIM steps, one call of the model each.
            eta: share of fresh noise in each step: 0 is deterministic DDIM, 1 ancestral sampling, which forgives the
                errors of a model that has trained for a short time.
            shape: [N, C, H, W] of the images.
            generator: source of the starting noise and of what `eta` adds; None for the CPU's default one.
            device: where the model is.
            progress: called as progress(done, steps) after each step.

        Returns:
            x0 [N, C, H, W] in [-1, 1].
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be between 1 and {self.steps}, got {steps}")
        n = shape[0]
        weights = torch.as_tensor(guidance, dtype=torch.float32, device=device).reshape(-1)
        if weights.numel() not in (1, n):
            raise ValueError(f"guidance must be one number or {n}, one per sample, got {weights.numel()}")
        if labels is not None:
            if labels.shape != (n,):
                raise ValueError(f"labels must be [{n}], one class per sample, got {list(labels.shape)}")
            labels = labels.to(device)
        scheduler = self._ddim(steps)
        source = "cpu" if generator is None else generator.device
        x = torch.randn(tuple(shape), generator=generator, device=source).to(device)
        with evaluating(model):
            for done, step in enumerate(scheduler.timesteps.tolist(), start=1):
                eps, _ = self.predict(model, x, torch.full((n,), step, device=device), labels, weights)
                fresh = torch.randn(tuple(shape), generator=generator, device=source).to(device) if eta > 0 else None
                x = scheduler.step(
                    eps, step, x, eta=eta, use_clipped_model_output=True, variance_noise=fresh
                ).prev_sample
                if progress is not None:
                    progress(done, steps)
        return x

    def _ddim(self, steps: int) -> Any:
        from diffusers import DDIMScheduler

        # Trailing: the first step is the noisiest one, as the starting noise is pure; the last one ends at x0 itself.
        scheduler: Any = DDIMScheduler.from_config(
            self.scheduler.config, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True
        )
        scheduler.set_timesteps(steps)
        return scheduler


def guide(eps_y: Tensor, eps_0: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance of strength w: 0 is the prediction for the class itself."""
    return (1 + w) * eps_y - w * eps_0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and each of its modules back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
