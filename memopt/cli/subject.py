"""What ``profile``, ``max-batch`` and ``ablate`` speak of: a recipe, or a model that a function makes.

These verbs take the same first argument and the same options for it, and ask for profiles at a batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.cli import inputs
from memopt.cli.options import add_data, add_preset, add_settings, pass_names, settings
from memopt.errors import InputError, blaming

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memopt.memory.profiler import Work
    from memopt.memory.report import MemoryReport

SEED = 0
"""Of models that a function makes, which have no setting for it."""
LOSS = "the output's own, else the mean of the output times random weights"
"""Of the true steps of such models. The mean alone says nothing of a model that ends in a normalization or a softmax:
it is constant, and gradients are rounding."""
_FACTORY = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the target and its options; ``names`` are settings of recipes."""
    parser.add_argument(
        "target",
        metavar="DIR|MODULE:FACTORY",
        help="a recipe folder, or a function or class that makes a model, such as my.nets:UNet",
    )
    parser.add_argument("--infer", action="store_true", help="a forward without gradients, not a training step")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="need not be there; default: cuda if it is")
    recipe = parser.add_argument_group("of a recipe")
    add_preset(recipe)
    add_settings(recipe, "microbatch")
    add_data(recipe)
    factory = parser.add_argument_group("of MODULE:FACTORY")
    factory.add_argument(
        "--input",
        metavar="NAME=SHAPE[:DTYPE]",
        action="append",
        default=[],
        help="an argument of the model, once for each; B in a shape is the batch size; also SHAPE or NAME=VALUE",
    )
    factory.add_argument("--optimizer", metavar="NAME", help="of torch.optim, such as adamw (default), sgd; or none")
    add_settings(parser, *names, others=False)


class Subject(ABC):
    """Something that can be profiled at any batch size."""

    def __init__(self, options: argparse.Namespace) -> None:
        from memopt.estimate import default_device

        self.target: str = options.target
        self.train = not options.infer
        self.device: str = options.device or default_device()
        self.real: bool = getattr(options, "real", False)

    @abstractmethod
    def profile(self, batch: int | None = None, passes: Sequence[Any] = ()) -> MemoryReport:
        """At a batch size (None: the one that was asked for), with further passes."""

    @abstractmethod
    def work(self, batch: int | None = None, *, device: str, real: bool) -> Work:
        """A step without passes, on fake tensors or on true ones, which are the same ones every time."""

    @property
    @abstractmethod
    def given(self) -> list[Any]:
        """The passes that were asked for, or that the recipe's preset has."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What determines the step, by name; ``seed`` is among it."""


def of(options: argparse.Namespace) -> Subject:
    """The subject that the options name.

    Raises:
        InputError: there is no such recipe or factory, or an option does not belong to it.
    """
    if not options.target.strip():
        raise InputError("an empty name is neither a recipe folder nor MODULE:FACTORY")
    factory = None if Path(options.target).is_dir() else _FACTORY.fullmatch(options.target)
    foreign = ("preset", "set", "microbatch", "data") if factory else ("input", "optimizer")
    for name in foreign:
        if getattr(options, name) not in (None, []):
            kind = "a recipe folder" if factory else "MODULE:FACTORY"
            raise InputError(f"--{name} belongs to {kind}, and {options.target} is none")
    return _Factory(options, *factory.groups()) if factory else _Recipe(options)


class _Recipe(Subject):
    def __init__(self, options: argparse.Namespace) -> None:
        from memopt.recipe import configure, load_recipe

        super().__init__(options)
        self.recipe = load_recipe(os.path.expanduser(options.target))  # which, unlike Path's, cannot fail
        self.config = configure(self.recipe, options.preset, settings(options))
        self.data, self.cache = options.data, options.cache

    def profile(self, batch: int | None = None, passes: Sequence[Any] = ()) -> MemoryReport:
        from memopt.estimate import at_batch, profile_recipe

        return profile_recipe(
            self.recipe,
            self.config if batch is None else at_batch(self.config, batch),
            train=self.train,
            device=self.device,
            passes=passes,
            real=self.real,
            data=self.data,
            cache=self.cache,
        )

    def work(self, batch: int | None = None, *, device: str, real: bool) -> Work:
        from memopt.estimate import at_batch, recipe_work

        config = self.config if batch is None else at_batch(self.config, batch)
        with _seeded(config.seed):
            return recipe_work(
                self.recipe, config, train=self.train, device=device, real=real, data=self.data, cache=self.cache
            )

    @property
    def given(self) -> list[Any]:
        from memopt.recipe import parse_passes

        return list(parse_passes(self.config.passes))

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)


class _Factory(Subject):
    def __init__(self, options: argparse.Namespace, module: str, name: str) -> None:
        from memopt.recipe import parse_passes

        super().__init__(options)
        self.inputs: list[str] = options.input
        given = getattr(options, "batch_size", None)
        self.batch = None if given is None else positive("--batch-size", given)
        self.passes = parse_passes(pass_names(options.passes or ""))
        self.optimizer = _optimizer("adamw" if options.optimizer is None else options.optimizer) if self.train else None
        inputs.arguments(self.inputs, self.batch or 1, "meta")  # bad ones are found before a model is built
        if self.batch is not None or getattr(options, "steps_batch", None) is not None:
            inputs.check_scales(self.inputs)
        self.make = _imported(self.target, module, name)

    @functools.cached_property
    def model(self) -> nn.Module:
        from memopt.estimate import fake_model, real_model

        return real_model(self.make, self.device) if self.real else fake_model(self.make)

    def profile(self, batch: int | None = None, passes: Sequence[Any] = ()) -> MemoryReport:
        from memopt.estimate import quiet, the_mode
        from memopt.memory.profiler import profile

        model, optimizer = self.model, self._made_optimizer(self.model)
        with contextlib.nullcontext() if self.real else the_mode():
            size = self.batch if batch is None else batch
            call = inputs.arguments(self.inputs, size, self.device if self.real else "cpu")
        with quiet():
            return profile(
                model,
                call,
                train=self.train,
                optimizer=optimizer,
                device=self.device,
                passes=[*self.passes, *passes],
                real=self.real,
            )

    def work(self, batch: int | None = None, *, device: str, real: bool) -> Work:
        from torch import Tensor
        from torch.utils._pytree import tree_map_only

        from memopt.estimate import fake_model, real_model, the_mode
        from memopt.memory.profiler import Work, arguments

        with _seeded(SEED):
            model = real_model(self.make, device) if real else fake_model(self.make)
            with contextlib.nullcontext() if real else the_mode():
                size = self.batch if batch is None else batch
                call = arguments(model, inputs.arguments(self.inputs, size, device if real else "cpu"))
                # Numbers that may be indices stay zero.
                call = tree_map_only(Tensor, lambda t: t.normal_() if t.is_floating_point() else t, call)
        return Work(model, call, lambda m, c: _weighted(m(*c[0], **c[1])), self._made_optimizer(model))

    @property
    def given(self) -> list[Any]:
        return list(self.passes)

    def settings(self) -> dict[str, Any]:
        optimizer = "none" if self.optimizer is None else self.optimizer.__name__
        return {"batch_size": self.batch, "input": self.inputs, "optimizer": optimizer, "seed": SEED, "loss": LOSS}

    def _made_optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        if self.optimizer is None:
            return None
        try:
            made: torch.optim.Optimizer = self.optimizer(model.parameters())
        except (TypeError, ValueError) as error:
            raise InputError(
                f"--optimizer {self.optimizer.__name__.lower()}: {error}. Choose another, or none"
            ) from None
        return made


def _weighted(output: Any) -> torch.Tensor:
    """The loss of true steps; its weights are the same in every step."""
    import torch

    from memopt.memory.profiler import default_loss

    generators: dict[torch.device, torch.Generator] = {}

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        here = tensor.device
        drawn = generators.setdefault(here, torch.Generator(here).manual_seed(SEED))
        return (tensor * torch.randn(tensor.shape, generator=drawn, device=here)).mean()

    return default_loss(output, mean)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is random inside depends on the seed; torch's generators go on as they were afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def positive(option: str, text: str) -> int:
    """The number of an option.

    Raises:
        InputError: it is none, or none of at least 1.
    """
    if not text.isdecimal() or len(text) > 16 or int(text) < 1:
        raise InputError(f"{option} must be a whole number of at least 1 and of at most 16 digits, not {text!r}")
    return int(text)


def _optimizer(name: str) -> Callable[..., Any] | None:
    import torch

    if name.lower() == "none":
        return None
    # LBFGS wants a closure, SparseAdam sparse gradients.
    known = {
        n.lower(): cls
        for n, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and n not in ("LBFGS", "SparseAdam")
    }
    del known["optimizer"]
    if name.lower() not in known:
        raise InputError(f"--optimizer {name!r} is none of {', '.join(sorted(known))}, none")
    return known[name.lower()]


def _imported(target: str, module: str, name: str) -> Callable[[], nn.Module]:
    """A function that calls the factory and checks what it returns."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        with blaming(f"{target}: {module} cannot be imported"):
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the module needs
        raise InputError(f"{target}: there is no module {error.name!r} in this folder or among the packages") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{target}: {getattr(found, '__name__', module)} has no {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{target} is no function or class, but a {type(found).__name__}")

    advice = ". It is called without arguments; wrap it in a function that gives those it needs"

    def make() -> nn.Module:
        from torch import nn

        with blaming(f"{target}() failed", advice):
            model = found()
        if not isinstance(model, nn.Module):
            raise InputError(f"{target}() must return a torch.nn.Module; it returned a {type(model).__name__}")
        return model

    return make


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Say what goes on, on a terminal; yields a function that says something else."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(text) as status:
        yield status.update
