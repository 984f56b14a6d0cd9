"""Memory profiles of what ``memopt train`` would run, and of models that are yet to be built.

``profile_recipe`` runs a recipe's training step as ``memopt.training.Trainer`` does it, as far as memory goes: its
model, its optimizer, the moving average of the weights, its passes, microbatches and clipping. By default nothing of it
is real. The model is built on fake tensors; a batch is made of the shapes of two samples and of two rows of draws, so
that a batch of any size costs the same.

All fake tensors here belong to one mode: what a recipe's code puts into a cache while it is profiled fits into the next
profile as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from memopt.errors import InputError, blaming
from memopt.memory import fake
from memopt.memory.profiler import Work, describe, profile_work
from memopt.memory.report import MemoryReport
from memopt.recipe import Recipe, TrainConfig, parse_passes

Batch = dict[str, Any]
MOST_ROWS = 1 << 24
"""No larger batch of a recipe is profiled: what is no tensor in it is truly there."""
MOST_ELEMENTS = 1 << 50
"""No input has more; torch counts bytes in 64 bits."""


def profile_recipe(
    recipe: Recipe[Any],
    config: TrainConfig,
    *,
    train: bool = True,
    device: str | None = None,
    passes: Sequence[Any] = (),
    real: bool = False,
    data: Path | None = None,
    cache: Path = Path("data"),
) -> MemoryReport:
    """Where the bytes of one step of a recipe go, in one process.

    Args:
        train: a training step; else the recipe's loss in eval mode without gradients: a forward of its model on a
            batch, without optimizer and moving average.
        device: ``"cpu"`` or ``"cuda"``; default: where training would run on this machine.
        passes: passes besides those of ``config``.
        real: build the model and run true steps, with the recipe's example for a batch.
        data, cache: what the recipe's data set is made from, if the recipe's ``example`` reads it.

    Raises:
        InputError: the recipe's loss or draws are not what a recipe gives.
        MemoptError: the recipe needs the values of tensors; the message names the line. Use ``real=True``.
    """
    kind = device or default_device()
    work = recipe_work(recipe, config, train=train, device=kind, real=real, data=data, cache=cache)
    texts = [f"{name}={describe(value)}" for name, value in work.batch.items() if isinstance(value, Tensor)]
    pieces = f"; microbatches of {config.microbatch}" if train and work.parts else ""
    with quiet():
        return profile_work(
            work,
            train=train,
            inputs=", ".join(texts) + pieces,
            device=kind,
            passes=[*parse_passes(config.passes), *passes],
            real=real,
        )


def recipe_work(
    recipe: Recipe[Any],
    config: TrainConfig,
    *,
    train: bool,
    device: str,
    real: bool,
    data: Path | None = None,
    cache: Path = Path("data"),
) -> Work:
    """One step of a recipe without its passes, on fake tensors or on true ones; arguments as for profile_recipe."""
    name = f"recipe {recipe.name}"
    if config.batch_size > MOST_ROWS:
        raise InputError(f"{name}: a batch of {config.batch_size:,} is larger than a profile takes ({MOST_ROWS:,})")
    with blaming(f"{name}: example(...) failed"):
        sample = recipe.example(config, data, cache)
    if not isinstance(sample, Mapping):
        raise InputError(f"{name}: example(...) must give a dictionary, not a {type(sample).__name__}")

    def make() -> nn.Module:
        with blaming(f"{name}: model(...) failed"):
            made: nn.Module = recipe.model(config)
        return made

    model = real_model(make, device) if real else fake_model(make)
    with blaming(f"{name}: a batch of {config.batch_size:,} cannot be made"):
        batch = (_real_batch if real else _fake_batch)(recipe, config, sample)
    if real:
        batch = tree_map_only(Tensor, lambda t: t.to(device), batch)
    work = Work(model, batch, functools.partial(_forward, recipe, config))
    if train:
        _add_training(work, recipe, config, device, real)
    return work


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the traceback of what fails on fake tensors: an error says it already."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def default_device() -> str:
    """Where a training run would be: ``cuda`` if this machine has it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def real_model(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """What ``make`` builds, on a device of this machine; the generators are left as they are.

    Raises:
        InputError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here for a real profile; leave out real (--real) to compute one")
    with torch.random.fork_rng():
        return make().to(device)


def fake_model(make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` builds, on fake tensors: built on them, or on true ones and copied if it needs their values."""
    with torch.random.fork_rng():
        try:
            with the_mode():
                model = make()
        except Exception as error:  # if it is not for the values that it needs, it fails again
            if "overflow" in str(error):  # of a size: do not try to allocate any such thing
                raise
            model = make()
    if not isinstance(model, nn.Module):
        raise InputError(f"a profile needs a torch.nn.Module, not a {type(model).__name__}")
    made: nn.Module = fake.copy_of(model, the_mode(), model)
    return made


@functools.cache
def the_mode() -> FakeTensorMode:
    """The mode of all fake tensors made here."""
    return fake.new_mode()


def _real_batch(recipe: Recipe[Any], config: TrainConfig, sample: Mapping[str, Any]) -> Batch:
    draws = recipe.draw(config, config.batch_size, torch.Generator().manual_seed(config.seed))
    return {**default_collate([sample] * config.batch_size), **draws}


def _fake_batch(recipe: Recipe[Any], config: TrainConfig, sample: Mapping[str, Any]) -> Batch:
    """A batch on fake tensors, from what two samples and draws for two look like."""
    draws = recipe.draw(config, 2, torch.Generator().manual_seed(config.seed))
    two = {**default_collate([sample, sample]), **draws}
    with the_mode():
        return {name: _rows(recipe, name, value, config.batch_size) for name, value in two.items()}


def _rows(recipe: Recipe[Any], name: str, two: Any, rows: int) -> Any:
    if isinstance(two, Tensor):
        if two.shape[:1] == (2,):
            check_size((rows, *two.shape[1:]), f"recipe {recipe.name}: {name!r}")
            return torch.empty((rows, *two.shape[1:]), dtype=two.dtype)
    elif isinstance(two, (list, tuple)) and len(two) == 2:
        return [two[0]] * rows
    raise InputError(
        f"recipe {recipe.name}: {name!r} has not one row for each sample: for two samples it is {describe(two)}"
    )


def check_size(shape: Sequence[int], what: str) -> None:
    """Raises InputError if a tensor of that shape is absurdly large."""
    if math.prod(shape) > MOST_ELEMENTS:
        raise InputError(f"{what}: a tensor of {'x'.join(map(str, shape))} has more than 2**50 elements")


def _forward(recipe: Recipe[Any], config: TrainConfig, model: nn.Module, part: Batch) -> Tensor:
    loss = recipe.loss(config, model, part)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InputError(f"recipe {recipe.name}: loss(...) must return one number, the mean loss; it returned {what}")
    return loss * (len(next(iter(part.values()))) / config.batch_size)


def _add_training(work: Work, recipe: Recipe[Any], config: TrainConfig, device: str, real: bool) -> None:
    """What training has besides a forward and a backward, in the order in which the Trainer makes it."""
    size, clip = config.microbatch, config.grad_clip
    # On the CPU it lies in the same memory, whatever the setting says.
    if config.ema_decay is not None and (config.ema_device == "model" or device == "cpu"):
        average = _average_of(work.model, config.ema_decay, real)
        work.extra, work.after = (average,), average.update_parameters
    with blaming(f"recipe {recipe.name}: optimizer(...) failed"):
        work.optimizer = recipe.optimizer(config, work.model)
    if size is not None and size < config.batch_size:
        work.parts = lambda batch: [
            {name: value[start : start + size] for name, value in batch.items()}
            for start in range(0, config.batch_size, size)
        ]
    if clip is not None:
        work.before_step = lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)


def _average_of(model: nn.Module, decay: float, real: bool) -> AveragedModel:
    def average(averages: Any, weights: Any, _: Any) -> None:
        torch._foreach_lerp_(averages, weights, 1 - decay)

    if real:
        return AveragedModel(model, multi_avg_fn=average)
    made = AveragedModel(nn.Module(), multi_avg_fn=average)
    made.module = fake.copy_of(model, the_mode(), model)
    return made


def at_batch(config: TrainConfig, batch: int) -> TrainConfig:
    """The configuration with another batch size."""
    return dataclasses.replace(config, batch_size=batch)
