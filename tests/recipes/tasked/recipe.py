"""The tiny recipe with two tasks: one that measures the model, one that only says what it was given."""

import json
from dataclasses import dataclass
from typing import Literal

import torch

from memopt import Task, TaskConfig
from memopt.recipe import TrainConfig, load_recipe
from tests.training_jobs import TINY

tiny = load_recipe(TINY)
TinyConfig: type[TrainConfig] = type(tiny.presets["small"])


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(TaskConfig):
    batch_size: int = 5
    scales: tuple[float, ...] = (1.0, 2.5)
    """What the input is multiplied by: 100% or
    more."""
    limit: int | None = None
    absolute: bool = True
    """Of ``absolute`` errors."""
    form: Literal["short", "long"] = "short"


class Measure(Task[TinyConfig, MeasureConfig]):
    name = "measure"
    summary = "Errors of the model by scale [of its input]"

    def options(self, config):
        return MeasureConfig(limit=config.width)

    def run(self, job):
        data = job.recipe.dataset(job.config, job.data, job.cache)
        rank, world = job.accelerator.process_index, job.accelerator.num_processes
        mine = data.x[: job.options.limit][rank::world]
        errors = []
        with torch.no_grad(), job.track("measuring", len(mine) * len(job.options.scales), "points") as advance:
            for scale in job.options.scales:
                total = torch.zeros(())
                for x in mine.split(job.options.batch_size):
                    error = job.model(x * scale) - x
                    total += (error.abs() if job.options.absolute else error).sum()
                    advance(len(x))
                errors.append(job.accelerator.reduce(total).item())
        if job.is_main:
            (job.out / "errors.json").write_text(json.dumps(errors))
        job.say(f"[errors] {errors}")


class Show(Task[TinyConfig, TaskConfig]):
    name = "show"
    summary = "What a task is given"

    def options(self, config):
        return TaskConfig()

    def run(self, job):
        first = next(iter(job.model.state_dict().values()))
        given = {
            "training": job.model.training,
            "grad": all(p.requires_grad for p in job.model.parameters()),
            "passes": [p.name for p in job.handle.passes],
            "weights": [str(job.weights.path), job.weights.sha256, str(job.weights.run), job.weights.step],
            "first": first.flatten()[0].item(),
            "width": job.config.width,
            "data": str(job.data),
            "random": torch.rand(()).item(),
        }
        job.warn("[b]nothing is measured")
        (job.out / "given.json").write_text(json.dumps(given))


class Tasked(type(tiny)):
    name = "tasked"
    tasks = {"measure": Measure(), "show": Show()}


def recipe():
    return Tasked()
