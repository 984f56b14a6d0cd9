"""What `memopt run examples/hae_v2` does beside training: `translate`, from weights to segmented anomalies with their
figures, and `sample`, pictures of both classes.

A translation goes through the validation split first, once for all guidance strengths of the grid; image labels choose
the strength, the threshold of the score and the scale of M, which `translation.json` keeps beside the weights. Then the
split that was asked for. Each batch is a file (batches.py); what follows is made of them in seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memopt import plots
from memopt.checkpoints import write_text
from memopt.errors import InputError
from memopt.tasks import Job, Task, TaskConfig
from memopt.training import seed_for

from .batches import Arrays, Batches
from .data import SliceDataset, read_index
from .diffusion import Diffusion
from .evaluate import Threshold, by_threshold, choose_threshold, drop_small, evaluate, map_scores
from .results import Curves, Findings, Method, Slices
from .simulate import MODALITIES
from .translation import Algorithm, Batch, Score, judge, reconstruct, segment, smooth, translate

if TYPE_CHECKING:
    from .recipe import HAEConfig

FLAIR, DDIB = "FLAIR intensity", "reconstruction (DDIB)"
"""The baselines' names."""
STORED = "translation.json"
"""Beside the weights: what validation chose for them."""


@dataclass(frozen=True, kw_only=True)
class TranslateConfig(Algorithm, TaskConfig):
    """The algorithm's settings, and what is translated."""

    batch_size: int = 20
    """Slices at once; the model is called on twice as many."""
    split: Literal["test", "val", "train"] = "test"
    """The slices to translate and evaluate."""
    guidance: float | Literal["auto"] = "auto"
    """Strength w; auto: the one of the grid with which validation's scores separate the classes best."""
    grid: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
    """Strengths to choose from; all of them take one pass."""
    map_guidance: float | Literal["auto"] = "auto"
    """Strength of the map and the mask; auto: the recipe's where validation chooses the score's, else the same."""
    score: Score | Literal["auto"] = "auto"
    """What a slice is judged by: cosine or ratio of the two errors, or M itself; auto: validation chooses."""
    modalities: tuple[str, ...] = ("flair", "t2")
    """The images that count."""
    baselines: bool = True
    """Compare with a threshold on FLAIR, and with reconstruction, which takes as many calls again."""
    reconstruction_guidance: float = 2.0
    """Strength of the reconstruction, where it adds up over the steps."""
    nifti: bool = True
    """Write masks and maps as volumes, too."""

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        TaskConfig.__post_init__(self)
        known = ", ".join(MODALITIES)
        checks = {
            "grid needs at least one number, and finite ones": bool(self.grid) and all(map(math.isfinite, self.grid)),
            "guidance must be auto or a finite number": self.guidance == "auto" or math.isfinite(self.guidance),
            "map_guidance must be auto or a finite number": self.map_guidance == "auto"
            or math.isfinite(self.map_guidance),
            f"modalities must be some of {known}": bool(self.modalities) and set(self.modalities) <= set(MODALITIES),
        }
        for message, holds in checks.items():
            if not holds:
                raise InputError(message)

    @property
    def channels(self) -> list[int]:
        """Of the modalities."""
        return [MODALITIES.index(name) for name in self.modalities]

    @property
    def strengths(self) -> tuple[float, ...]:
        """Guidance strengths that validation tries."""
        return self.grid if self.guidance == "auto" else (self.guidance,)

    @property
    def judges(self) -> tuple[Score, ...]:
        """Scores that validation tries; where they are as good, the first."""
        return typing.get_args(Score) if self.score == "auto" else (self.score,)


@dataclass(frozen=True)
class Calibration:
    """What the image labels of the validation split chose."""

    guidance: float
    score: Score
    threshold: float
    """Slices with a higher score are unhealthy."""
    largest: float
    """The largest M_te with the map's strength: the scale of the masks' quantile."""
    auroc: dict[str, float]
    """Of the validation split, by score and guidance strength."""
    baselines: dict[str, float]
    """Their thresholds, by name."""


class Translate(Task["HAEConfig", TranslateConfig]):
    """Anomaly segmentation with trained weights."""

    name: ClassVar[str] = "translate"
    summary: ClassVar[str] = "segment anomalies with trained weights; leave figures, pictures, a report and volumes"

    def options(self, config: HAEConfig) -> TranslateConfig:
        return TranslateConfig(
            steps=config.translate_steps,
            until=config.translate_until,
            passes=config.translate_passes,
        )

    def run(self, job: Job[HAEConfig, TranslateConfig]) -> None:
        _Translation(job).run()


@dataclass(frozen=True, kw_only=True)
class SampleConfig(TaskConfig):
    """What is drawn, and how."""

    batch_size: int = 4
    """Samples of each class in a row."""
    guidance: tuple[float, ...] = (1.0, 1.8, 2.0, 3.0)
    """Strengths, one row each."""
    steps: int = 50
    """Calls of the model for each row."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """With fresh noise in each step, or without any but the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.guidance:
            raise InputError("sample needs at least one step and one guidance strength")


class Sample(Task["HAEConfig", SampleConfig]):
    """Pictures of both classes at several guidance strengths."""

    name: ClassVar[str] = "sample"
    summary: ClassVar[str] = "draw slices of both classes at several guidance strengths"

    def options(self, config: HAEConfig) -> SampleConfig:
        return SampleConfig(
            guidance=config.guidance,
            steps=config.sample_steps,
            passes=tuple(p for p in config.translate_passes if not p.startswith("grad_accumulation")),
        )

    def run(self, job: Job[HAEConfig, SampleConfig]) -> None:
        from .recipe import HAE

        options, recipe = job.options, job.recipe
        assert isinstance(recipe, HAE)
        if not job.is_main:
            return
        config = dataclasses.replace(
            job.config,
            guidance=options.guidance,
            sample_steps=options.steps,
            sample_eta=1.0 if options.sampler == "ddpm" else 0.0,
        )
        generator = torch.Generator().manual_seed(seed_for(options.seed, "sample"))
        with job.track("sampling", options.steps * len(options.guidance)) as advance:
            grid = recipe.grid(config, job.model, generator, options.batch_size, progress=lambda *_: advance(1))
        steps = f"{options.steps} {options.sampler.upper()} steps"
        file = job.out / "samples.png"
        plots.sample_grid(dataclasses.replace(grid, title=f"{steps}, seed {options.seed}, {job.weights.path}"), file)
        job.say(f"done: {file}")


class _Translation:
    def __init__(self, job: Job[HAEConfig, TranslateConfig]) -> None:
        self.job, self.options = job, job.options
        self.diffusion = Diffusion(job.config.diffusion_steps)
        if job.config.num_classes is None or job.config.num_classes < 2:
            raise InputError("translation needs a model of two classes, healthy and lesion: num_classes=2")
        if self.options.until > self.diffusion.steps:
            raise InputError(f"until={self.options.until} is beyond diffusion_steps={self.diffusion.steps}")
        given, usual = self.options.map_guidance, job.config.translate_map_guidance
        self.map_guidance = given if given != "auto" else usual if self.options.guidance == "auto" else None
        """None: that of the score."""
        self.root = job.config.prepared(job.data, job.cache)
        self.source = Path(read_index(self.root)["config"]["source"])

    def run(self) -> None:
        job, options = self.job, self.options
        target = _Split(SliceDataset(self.root, options.split))
        _check_trained(job, target.dataset, self.diffusion)
        chosen = self.calibrate()
        batches = self.translate(target, self.with_maps((chosen.guidance,)), options.split)
        decoded = self.decode(target, batches, options.split) if options.baselines else None
        if job.is_main:
            self.finish(target.slices, batches, decoded, chosen)

    def map_of(self, guidance: float) -> float:
        """The map's strength where the score has this one."""
        return guidance if self.map_guidance is None else self.map_guidance

    def with_maps(self, strengths: tuple[float, ...]) -> tuple[float, ...]:
        """The score's strengths and the map's, which takes the same calls."""
        return tuple(dict.fromkeys((*strengths, *map(self.map_of, strengths))))

    def calibrate(self) -> Calibration:
        """What validation chose, as it is stored beside the weights, or chosen now."""
        job, options = self.job, self.options
        known = self._settings(
            {
                "strengths": options.strengths,
                "map_guidance": self.map_guidance,
                "scores": options.judges,
                "baselines": options.reconstruction_guidance if options.baselines else False,
            }
        )
        file = job.weights.path.parent / STORED
        stored = _read_json(file)
        if stored.get("settings") == known:
            job.say(f"validation's choices: {file}")
            return Calibration(**stored["chosen"])
        split = _Split(SliceDataset(self.root, "val"))
        slices = split.slices
        choose_threshold(slices.labels.astype(np.float32), slices.labels)  # both kinds are there, before the work
        strengths = self.with_maps(options.strengths)
        batches = self.translate(split, strengths, "validation")  # apart from the split val, with fewer strengths
        difference, healthy, null, peaks = (
            batches.joined(name, 1) for name in ("difference", "healthy", "null", "peak")
        )
        found = {
            (score, i): choose_threshold(judge(difference[i], healthy[i], null[i], score), slices.labels)
            for score in options.judges
            for i in range(len(options.strengths))  # not the map's, where the grid does not have it
        }
        score, best = max(found, key=lambda key: (found[key].auroc, found[key].margin))
        choice, guidance = found[score, best], strengths[best]
        baselines = {}
        if options.baselines:
            maps = self.decode(split, batches, "validation").joined("map")
            baselines = {DDIB: _cut(maps, slices).value, FLAIR: _cut(_flair(slices), slices).value}
        chosen = Calibration(
            guidance=guidance,
            score=score,
            threshold=choice.value,
            largest=float(peaks[strengths.index(self.map_of(guidance))].max()),
            auroc={f"{name}, w = {strengths[i]:g}": one.auroc for (name, i), one in found.items()},
            baselines=baselines,
        )
        job.say(
            f"validation: image AUROC {choice.auroc:.3f} with w = {guidance:g} and the score {score}, "
            f"threshold {choice.value:.3g}"
        )
        if choice.auroc < 0.6:
            job.warn("the weights hardly tell healthy from unhealthy slices of the validation split: train for longer")
        if job.is_main:
            write_text(file, json.dumps({"settings": known, "chosen": dataclasses.asdict(chosen)}, indent=1))
        job.accelerator.wait_for_everyone()
        return chosen

    def translate(self, split: _Split, strengths: tuple[float, ...], name: str) -> Batches:
        """Each batch's arrays, those of `Translated` with an axis of strengths before, and the encoded slices."""

        def compute(rows: range, step: Callable[[int, int], None]) -> Arrays:
            images, generators = split.batch(rows, self.options.seed, self.job.accelerator.device)
            batch = translate(
                self.job.model,
                images,
                strengths,
                self.options,
                diffusion=self.diffusion,
                modalities=self.options.channels,
                generators=generators,
                progress=step,
            )
            return _arrays(batch, keep_encoded=self.options.baselines)

        needed = ["encoded"] if self.options.baselines else []
        return self._work(split, name, {"strengths": strengths}, compute, f"translating {name}", needed)

    def decode(self, split: _Split, encoded: Batches, name: str) -> Batches:
        """The maps of the reconstruction baseline."""
        guidance = self.options.reconstruction_guidance

        def compute(rows: range, step: Callable[[int, int], None]) -> Arrays:
            images, _ = split.batch(rows, self.options.seed, self.job.accelerator.device)
            start = torch.from_numpy(encoded.read(rows.start // encoded.batch, "encoded")).to(images)
            decoded = reconstruct(
                self.job.model, start, guidance, self.options, diffusion=self.diffusion, progress=step
            )
            error = (decoded - images)[:, self.options.channels].square().mean(dim=1)
            return {"map": smooth(error.float().cpu().numpy())}

        return self._work(split, f"{name}-reconstructed", {"strengths": (guidance,)}, compute, f"reconstructing {name}")

    def _work(
        self,
        split: _Split,
        name: str,
        more: dict[str, Any],
        compute: Callable[[range, Callable[[int, int], None]], Arrays],
        what: str,
        needed: Iterable[str] = (),
    ) -> Batches:
        job = self.job
        batches = Batches(job.out / "batches" / name, len(split.slices), self.options.batch_size, self._settings(more))
        rank, world = job.accelerator.process_index, job.accelerator.num_processes
        missing = batches.missing(needed)
        job.accelerator.wait_for_everyone()  # all have seen what is missing before the first writes
        mine = [number for number in missing if number % world == rank]
        with job.track(what, len(mine) * self.options.steps) as advance:
            for number in mine:
                batches.write(number, compute(batches.rows(number), lambda *_: advance(1)))
        job.accelerator.wait_for_everyone()
        return batches

    def _settings(self, more: dict[str, Any]) -> dict[str, Any]:
        """Everything that determines results, as JSON gives it back."""
        options = self.options
        algorithm = {f.name: getattr(options, f.name) for f in dataclasses.fields(Algorithm)}
        index = json.dumps(read_index(self.root), sort_keys=True)
        settings = {
            "weights": self.job.weights.sha256,
            "data": hashlib.sha256(index.encode()).hexdigest(),
            **algorithm,
            "modalities": options.modalities,
            "passes": options.passes,
            "seed": options.seed,
            "batch_size": options.batch_size,
            **more,
        }
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found

    def finish(self, slices: Slices, batches: Batches, decoded: Batches | None, chosen: Calibration) -> None:
        """Figures, pictures, report, volumes."""
        from .report import write_report

        job, options = self.job, self.options
        names = ("map", "peak", "end", "difference", "healthy", "null")
        # The strength of the score is the first; that of the map, and of all that is shown, the last, often the same.
        by_strength = {name: batches.joined(name, 1) for name in names}
        difference, healthy, null = (by_strength[name][0] for name in ("difference", "healthy", "null"))
        scores = judge(difference, healthy, null, chosen.score)
        maps, peak, end, difference, healthy, null = (by_strength[name][-1] for name in names)
        unhealthy = scores > chosen.threshold
        masks = drop_small(segment(maps, unhealthy, peak, chosen.largest) & slices.foreground)
        methods = [Method("translation", scores, maps, unhealthy, masks)]
        if decoded is not None:
            methods += [
                by_threshold(DDIB, decoded.joined("map"), slices, chosen.baselines[DDIB]),
                by_threshold(FLAIR, _flair(slices), slices, chosen.baselines[FLAIR]),
            ]
        job.say("evaluating")
        findings = Findings(
            slices=slices,
            methods=tuple(methods),
            curves=Curves(
                timesteps=np.array(options.timesteps),
                modalities=options.modalities,
                difference=difference,
                healthy=healthy,
                null=null,
                end=end,
            ),
            rows=evaluate(methods, slices, seed=options.seed),
            threshold=chosen.threshold,
            about=self._about(chosen, slices),
        )
        report = write_report(findings, job.out)
        if options.nifti:
            from .volumes import write_volumes

            write_volumes(job.out / "nifti", slices, methods[0], self.source)
        job.say((job.out / "metrics.md").read_text())
        job.say(f"done: {report}")

    def _about(self, chosen: Calibration, slices: Slices) -> dict[str, Any]:
        job, options = self.job, self.options
        simulated = "simulated patients, " if (self.source / "simulation.json").exists() else ""
        device = job.accelerator.device
        hardware = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        return {
            "data": f"{simulated}split {slices.split}: {len(slices.patients)} patients, {len(slices)} slices, "
            f"{int(slices.labels.sum())} of them with a lesion",
            "weights": f"{job.weights.path} (step {job.weights.step}, SHA-256 {job.weights.sha256[:16]})",
            "guidance": f"w = {chosen.guidance:g}, {'given' if options.guidance != 'auto' else 'chosen by validation'}",
            "map's guidance": f"w = {self.map_of(chosen.guidance):g}",
            "score": f"{chosen.score}, {'given' if options.score != 'auto' else 'chosen by validation'}; "
            f"threshold {chosen.threshold:.4g}",
            "validation AUROC": "; ".join(f"{name}: {auroc:.3f}" for name, auroc in chosen.auroc.items()),
            "largest M": f"{chosen.largest:.4g}",
            **{f.name: getattr(options, f.name) for f in dataclasses.fields(Algorithm)},
            "modalities": ", ".join(options.modalities),
            "batch size": options.batch_size,
            "passes": ", ".join(options.passes) or "none",
            "processes": job.accelerator.num_processes,
            "seed": options.seed,
            "hardware": hardware,
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "date": date.today().isoformat(),
        }


class _Split:
    """The slices of a split, as results and as batches."""

    def __init__(self, dataset: SliceDataset) -> None:
        self.dataset = dataset
        self.slices = Slices(
            split=dataset.split,
            patients=tuple(dataset.patients),
            patient=dataset.patient,
            slices=dataset.slices,
            images=dataset.images,
            truth=dataset.masks,
            foreground=np.asarray((dataset.images > 0).any(axis=1)),
        )

    def batch(self, rows: Iterable[int], seed: int, device: torch.device) -> tuple[Tensor, list[torch.Generator]]:
        """Images [N, 4, H, W] and a generator for each slice, which depends on the slice alone."""
        images = torch.stack([self.dataset[row]["image"] for row in rows]).to(device)
        slices = self.slices
        names = [(slices.patients[slices.patient[row]], int(slices.slices[row])) for row in rows]
        return images, [torch.Generator().manual_seed(seed_for(seed, "noise", *name)) for name in names]


def _arrays(batch: Batch, keep_encoded: bool) -> Arrays:
    names = [field.name for field in dataclasses.fields(batch.by_guidance[0])]
    arrays = {name: np.stack([getattr(found, name) for found in batch.by_guidance]) for name in names}
    return arrays | ({"encoded": batch.encoded.float().cpu().numpy()} if keep_encoded else {})


def _flair(slices: Slices) -> NDArray[np.float32]:
    return slices.images[:, MODALITIES.index("flair")].astype(np.float32)


def _cut(maps: NDArray[np.float32], slices: Slices) -> Threshold:
    """A baseline's threshold: image labels choose it for the slices' scores."""
    return choose_threshold(map_scores(maps, slices.foreground), slices.labels)


def _check_trained(job: Job[Any, Any], dataset: SliceDataset, diffusion: Diffusion) -> None:
    image = dataset[len(dataset) // 2]["image"][None].to(job.accelerator.device)
    now = torch.full((1,), job.options.until // 2, device=image.device)
    with torch.no_grad():
        eps, _ = diffusion.predict_both(job.model, image, now, torch.zeros(1, dtype=torch.long, device=image.device))
    if not eps.any():
        raise InputError(
            f"{job.weights.path} holds untrained weights (the noise they predict is zero everywhere): train them first"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
