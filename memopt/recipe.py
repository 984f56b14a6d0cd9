"""What ``memopt train DIR`` loads: a folder with a ``recipe.py`` that defines ``recipe()`` and returns a Recipe.

A recipe says what is trained (model, data, loss); the loop in ``memopt.training`` knows the rest and nothing of the
model. Configurations are frozen dataclasses: :class:`TrainConfig` holds what the loop reads, a recipe subclasses it
with its own fields, and presets are instances with names.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from memopt.config import build
from memopt.errors import InputError, blaming

if TYPE_CHECKING:
    from memopt.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the training loop reads. Every field can be set with ``--set name=value``."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Samples per optimizer step, over all processes."""
    microbatch: int | None = None
    """Samples per forward and process; gradients are accumulated to those of the batch (dropout masks differ)."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    lr_anneal: bool = False
    """Lower the learning rate linearly to zero over all steps."""
    warmup_steps: int = 0
    """Raise the learning rate linearly over the first steps."""
    grad_clip: float | None = None
    """Clip gradients to this global norm."""
    ema_decay: float | None = 0.9999
    """Decay of the moving average of the weights, approached as (1 + step) / (10 + step); None for no average."""
    ema_device: Literal["model", "cpu"] = "model"
    """Where the average lives: beside the model, or on the CPU, which saves one copy of the weights on the device."""
    passes: tuple[str, ...] = ()
    """memopt passes, by name: ``checkpoint``, ``amp:dtype=fp16``."""
    budget: str | None = None
    """Bytes that a step may take on the device, such as 8GiB: further passes are planned for it (`memopt.plan`)."""
    allow: tuple[str, ...] = ()
    """Passes that are not exact and may be planned: amp, optimizer_8bit."""
    seed: int = 0
    """Determines everything random: initial weights, data order, noise, dropout, samples."""
    log_every: int = 10
    """Steps between two lines of output; losses are recorded for every step."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 3
    """How many checkpoints are kept."""
    sample_every: int = 0
    """Steps between two sample grids; 0: one at the end."""
    num_workers: int = 2
    """Processes that load data, at most 4 and at most one per CPU core; 0 loads in the training process."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("sample_every", "warmup_steps", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(0 < self.lr < float("inf"), "lr must be positive and finite")
        _require(self.microbatch is None or self.microbatch >= 1, "microbatch must be at least 1")
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip must be positive")
        _require(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)")
        _require(0 <= self.num_workers <= 4, "num_workers must be between 0 and 4")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Grid:
    """Pictures with labels: ``images`` [rows, columns, H, W], grey values in [-1, 1]."""

    images: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    title: str = ""


C = TypeVar("C", bound=TrainConfig)


class Recipe(ABC, Generic[C]):
    """What to train. Methods get the configuration; they keep no state, so that a resumed run needs none of theirs."""

    name: ClassVar[str]
    presets: Mapping[str, C]
    """Configurations by name; the first is the default."""
    tasks: Mapping[str, Task[C, Any]] = {}
    """Further tasks by name, for ``memopt run``."""

    @abstractmethod
    def model(self, config: C) -> nn.Module:
        """A new model. Random initialisation may use the global generator, which is seeded before."""

    @abstractmethod
    def dataset(self, config: C, data: Path | None, cache: Path) -> Dataset[Any]:
        """A map-style data set of flat dictionaries, one per sample: tensors, and strings or numbers beside them.

        ``data`` is what the user gave (None: the recipe's own source), ``cache`` a folder for prepared data. An item
        depends on its index alone; what is random belongs in ``draw``.
        """

    @abstractmethod
    def loss(self, config: C, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over the samples of ``batch``, which holds what the data set and ``draw`` give, on the device.

        ``model`` may be wrapped for several processes: call it, and nothing else of it.
        """

    def example(self, config: C, data: Path | None, cache: Path) -> dict[str, Any]:
        """One sample as the data set gives it: the same names, shapes and types; the values do not matter.

        A profile asks for it to know what a batch looks like. The default reads the first sample of the data set; where
        that has to be prepared first, a recipe that makes one up here can be profiled before its data is there.
        """
        sample: dict[str, Any] = self.dataset(config, data, cache)[0]
        return sample

    def draw(self, config: C, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Everything random that ``n`` samples need (noise, time steps, ...), tensors of n rows, on the CPU.

        Drawn for the whole batch and then cut, so that the result depends neither on the microbatch size nor on the
        number of processes.
        """
        return {}

    def sample(self, config: C, model: nn.Module, generator: torch.Generator) -> Grid | None:
        """Pictures made by the model (in eval mode, without gradients), or None if there is nothing to show."""
        return None

    def optimizer(self, config: C, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer; AdamW unless a recipe says otherwise."""
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def load_recipe(directory: str | Path) -> Recipe[Any]:
    """The recipe in ``directory``; its files may import each other relatively (``from .model import ...``).

    Raises:
        InputError: no such folder, no recipe.py in it, or one that fails or whose ``recipe()`` returns no Recipe.
    """
    folder = Path(directory).resolve()
    if not folder.is_dir():
        raise InputError(f"no recipe folder {directory}")
    if not (folder / "recipe.py").is_file():
        raise InputError(f"{directory} has no recipe.py; a recipe folder defines recipe() there")
    package = f"memopt_recipe_{zlib.crc32(str(folder).encode()):x}"  # two folders of one name stay apart
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, None, origin=str(folder), is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    file = folder / "recipe.py"
    try:
        with blaming(f"{file} cannot be imported"):
            module = importlib.import_module(f"{package}.recipe")
    except ModuleNotFoundError as error:
        name = str(error.name).removeprefix(f"{package}.")
        if name != error.name:
            raise InputError(f"{file} imports .{name}, which is not in that folder") from error
        if (folder / f"{name}.py").is_file():
            raise InputError(f"{file}: write `from .{name} import ...` for a file beside it") from error
        raise
    make = getattr(module, "recipe", None)
    if not callable(make):
        raise InputError(f"{file} does not define recipe()")
    with blaming(f"recipe() in {file} failed"):
        made = make()
    if not isinstance(made, Recipe):
        raise InputError(f"recipe() in {file} returned a {type(made).__name__}, not a memopt.Recipe")
    return made


def configure(recipe: Recipe[C], preset: str | None, values: Mapping[str, Any], base: C | None = None) -> C:
    """The configuration of a preset (or ``base``) with some values replaced.

    Raises:
        InputError: unknown preset or key, or a value of the wrong kind.
    """
    if base is None or preset is not None:
        name = next(iter(recipe.presets)) if preset is None else preset
        if name not in recipe.presets:
            raise InputError(f"recipe {recipe.name} has no preset {name!r}; presets: {', '.join(recipe.presets)}")
        base = recipe.presets[name]
    return build(type(base), values, what=f"recipe {recipe.name}", base=base)


def run_folder(recipe: Recipe[Any], preset: str | None) -> Path:
    """Where ``memopt train`` leaves a run of this preset (None: the first), unless told otherwise."""
    return Path("runs") / f"{recipe.name}-{preset or next(iter(recipe.presets))}"


def stored(run: Path, recipe: Recipe[C]) -> tuple[C | None, Path | None]:
    """The configuration and the data of the run in a folder; Nones if there is none yet.

    Raises:
        InputError: its ``config.json`` cannot be read, or it is a run of another recipe.
    """
    file = run / "config.json"
    if not file.exists():
        return None, None
    kind = type(next(iter(recipe.presets.values())))
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        described = json.loads(file.read_text())
        name, data = described["recipe"], described.get("data")
        values = {k: v for k, v in described["config"].items() if k in known}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); move it away and give the run's settings again, or choose another folder"
        ) from None
    if name != recipe.name:
        raise InputError(f"{run} is a run of recipe {name!r}, not of {recipe.name!r}")
    return build(kind, values, what=str(file)), None if data is None else Path(data)


def parse_passes(texts: tuple[str, ...]) -> list[dict[str, dict[str, str]]]:
    """Tables for ``memopt.apply`` from the command line's form ``name`` or ``name:option=value:option=value``."""
    tables = []
    for text in texts:
        name, *options = text.split(":")
        table = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise InputError(f"pass {text!r}: write options as name:option=value, not {option!r}")
            table[key] = value
        tables.append({name: table})
    return tables
