"""HAE V2 on brain slices: the recipe behind ``memopt train examples/hae_v2``.

Without ``--data`` it trains on simulated patients (see simulate.py); with it, on a folder in the layout of BraTS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from memopt.errors import InputError
from memopt.recipe import Grid, Recipe, TrainConfig

from .data import SliceDataset, ensure_data
from .diffusion import Diffusion
from .model import HAEUNetModelV2
from .simulate import MODALITIES
from .tasks import Sample, Translate

CLASSES = ("healthy", "lesion")


@dataclass(frozen=True, kw_only=True)
class HAEConfig(TrainConfig):
    """The loop's settings, and those of the model, its data and its samples."""

    image_size: int = 128
    """Pixels on each side of a slice."""
    model_channels: int = 128
    """Base width of the UNet."""
    channel_mult: tuple[int, ...] = (1, 1, 2, 3, 4)
    """Width of each level, in units of model_channels."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level."""
    attention_resolutions: tuple[int, ...] = (4, 8, 16)
    """Downsampling factors of the levels that have attention."""
    num_heads: int = 4
    """Heads of the attention blocks."""
    dropout: float = 0.1
    """In residual blocks and MLPs."""
    num_classes: int = 2
    """Healthy and lesion."""
    drop_condition: float = 0.1
    """Share of samples trained without their class, for classifier-free guidance (the paper's threshold)."""
    weighting: Literal["noise", "image"] = "noise"
    """What the loss is the error of: the noise in a sample; or the image behind it, but for at most 5 times as much."""
    diffusion_steps: int = 1000
    """Steps of the forward process."""
    guidance: tuple[float, ...] = (1.0, 1.8, 2.0, 3.0)
    """Guidance strengths of the sample grid, one row each."""
    sample_steps: int = 50
    """DDIM steps of a sample."""
    sample_eta: float = 1.0
    """Fresh noise in each step of a sample: 1 is ancestral sampling, 0 deterministic DDIM."""
    patients: int = 40
    """How many patients are simulated where no data is given."""
    slice_step: int = 1
    """Only each so many-th slice of a patient is used."""
    data_seed: int = 0
    """Determines the simulated patients and the split into training, validation and test."""
    translate_steps: int = 600
    """Calls of the model in a translation."""
    translate_until: int = 600
    """The timesteps of a translation end before this one."""
    translate_map_guidance: float | None = None
    """Strength w of a translation's maps; None: that of its score."""
    translate_passes: tuple[str, ...] = ("outer_product", "inference_mode")
    """memopt passes of a translation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = {2**level for level in range(len(self.channel_mult))}
        checks = {
            "image_size must be at least 1": self.image_size >= 1,
            "diffusion_steps must be at least 1": self.diffusion_steps >= 1,
            "sample_steps must be at least 1": self.sample_steps >= 1,
            "patients must be at least 3, one for each split": self.patients >= 3,
            "slice_step must be at least 1": self.slice_step >= 1,
            "data_seed must not be negative": self.data_seed >= 0,
            "translate_steps must be between 1 and translate_until": 1 <= self.translate_steps <= self.translate_until,
            "drop_condition must be in [0, 1]": 0 <= self.drop_condition <= 1,
            "sample_eta must be in [0, 1]": 0 <= self.sample_eta <= 1,
            "guidance needs at least one number, and finite ones": bool(self.guidance)
            and all(map(math.isfinite, self.guidance)),
            f"attention_resolutions must be among {sorted(levels)}, the levels' downsampling factors": levels
            >= set(self.attention_resolutions),
        }
        for message, holds in checks.items():
            if not holds:
                raise InputError(message)

    def prepared(self, data: Path | None, cache: Path) -> Path:
        """The folder of prepared slices, which is made if it is not in the cache yet."""
        return ensure_data(
            data, cache, self.image_size, seed=self.data_seed, patients=self.patients, slice_step=self.slice_step
        )


class HAE(Recipe[HAEConfig]):
    """Class-conditional diffusion of four-modality slices, trained on healthy and diseased ones alike.

    The model is the plain one, and the presets' passes make it the Conservative one: ``--passes ""`` takes that away.
    """

    name = "hae_v2"
    tasks = {task.name: task for task in (Translate(), Sample())}
    presets = {
        "quickstart": HAEConfig(
            image_size=32,
            # Not 32: one channel per group of the norms, which then cancel the brightness of the image and whatever
            # time and class add before them.
            model_channels=64,
            channel_mult=(1, 1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            dropout=0.0,
            # What a class says of an image shows where noise hides most of it, and there the error of the noise is
            # small whatever the model knows: in so few steps it would learn of nothing but noise.
            weighting="image",
            steps=500,
            batch_size=16,
            lr=1e-3,
            warmup_steps=20,
            lr_anneal=True,
            ema_decay=0.99,
            save_every=250,
            num_workers=0,
            passes=("outer_product",),
            # Few slices of many patients, not many of few: from 3,100 slices of 30 patients a small classifier learns
            # to tell those of others with an AUROC of 0.78, from as many of 120 with one of 0.94.
            patients=160,
            slice_step=4,
            translate_steps=25,
            # A pixel here is the mean of 16 of the full model's, with a sixteenth of their noise's variance: as much is
            # hidden at 344 as is at 600 there (Hoogeboom et al., arXiv 2301.11093, section 2).
            translate_until=344,
            # What separates slices best blurs the maps of a model of so few steps (docs/translation.md).
            translate_map_guidance=1.0,
        ),
        "brats128": HAEConfig(
            steps=100_000,
            batch_size=28,
            save_every=5000,
            sample_every=5000,
            log_every=50,
            sample_steps=250,
            num_workers=4,
            passes=("outer_product",),
            # A batch of 20 slices, 40 with both conditions, in four parts.
            translate_passes=("outer_product", "inference_mode", "grad_accumulation:parts=4"),
        ),
    }

    def model(self, config: HAEConfig) -> nn.Module:
        try:
            return HAEUNetModelV2(
                image_size=config.image_size,
                in_channels=len(MODALITIES),
                model_channels=config.model_channels,
                out_channels=len(MODALITIES),
                num_res_blocks=config.num_res_blocks,
                attention_resolutions=config.attention_resolutions,
                dropout=config.dropout,
                channel_mult=config.channel_mult,
                num_classes=config.num_classes,
                num_heads=config.num_heads,
            )
        except ValueError as error:
            raise InputError(f"recipe {self.name}: {error}") from None

    def dataset(self, config: HAEConfig, data: Path | None, cache: Path) -> Dataset[dict[str, Tensor]]:
        # A model that cannot be built is found out before minutes of preparation.
        with torch.device("meta"):
            self.model(config)
        root = config.prepared(data, cache)
        dataset = SliceDataset(root, "train")
        highest = int(dataset.labels.max())
        if highest >= config.num_classes:
            raise InputError(
                f"{root} has slices of class {highest} ({CLASSES[highest]}), out of range for num_classes="
                f"{config.num_classes}; set num_classes={highest + 1}"
            )
        return dataset

    def example(self, config: HAEConfig, data: Path | None, cache: Path) -> dict[str, Tensor]:
        size, number = config.image_size, torch.tensor(0)
        return {
            "image": torch.zeros(len(MODALITIES), size, size),
            "mask": torch.zeros(size, size, dtype=torch.bool),
            "label": number,
            "patient": number,
            "slice": number,
        }

    def draw(self, config: HAEConfig, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = config.image_size
        return {
            "timesteps": torch.randint(config.diffusion_steps, (n,), generator=generator),
            "noise": torch.randn(n, len(MODALITIES), size, size, generator=generator),
            "null": torch.rand(n, generator=generator) < config.drop_condition,
        }

    def loss(self, config: HAEConfig, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # Made anew, in less than 0.1 ms: kept in a cache, its tables would stay the fake tensors of a profile.
        losses = Diffusion(config.diffusion_steps).training_loss(
            model,
            batch["image"],
            batch["timesteps"],
            batch["noise"],
            y=batch["label"],
            null=batch["null"],
            clf_free=True,
        )
        if config.weighting == "image":
            losses = losses * Diffusion(config.diffusion_steps).image_weight(batch["timesteps"])
        return losses.mean()

    def sample(self, config: HAEConfig, model: nn.Module, generator: torch.Generator) -> Grid:
        """Two healthy and two diseased samples for each guidance strength, from the same noise in every row."""
        return self.grid(config, model, generator, 2)

    def grid(
        self,
        config: HAEConfig,
        model: nn.Module,
        generator: torch.Generator,
        columns: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Grid:
        """`columns` samples of each class for each guidance strength, from the same noise in every row."""
        device = next(model.parameters()).device
        size, rows = config.image_size, len(config.guidance)
        labels = torch.arange(len(CLASSES)).repeat_interleave(columns).clamp(max=config.num_classes - 1)
        state = generator.get_state()
        images = []
        for guidance in config.guidance:
            generator.set_state(state)
            images.append(
                Diffusion(config.diffusion_steps).sample(
                    model,
                    labels,
                    guidance,
                    min(config.sample_steps, config.diffusion_steps),
                    eta=config.sample_eta,
                    shape=(len(labels), len(MODALITIES), size, size),
                    generator=generator,
                    device=device,
                    progress=progress,
                )
            )
        # The four modalities of a sample stand side by side in its picture.
        picture = torch.stack(images).permute(0, 1, 3, 2, 4).reshape(rows, len(labels), size, len(MODALITIES) * size)
        modalities = " ".join(MODALITIES)
        return Grid(
            picture,
            rows=tuple(f"w = {w:g}" for w in config.guidance),
            columns=tuple(f"{CLASSES[label]}: {modalities}" for label in labels.tolist()),
        )


def recipe() -> Recipe[Any]:
    """What ``memopt train`` loads."""
    return HAE()
