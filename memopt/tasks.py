"""What ``memopt run DIR TASK`` carries out: what else a recipe does with the weights that ``memopt train`` left.

A recipe names its tasks in ``Recipe.tasks``. A :class:`Task` gets a :class:`Job`: the model with its weights and
passes, on its device, the options, and the folder to write into.
"""

from __future__ import annotations

import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from torch import nn

from memopt import checkpoints, core, files
from memopt.errors import InputError, blaming
from memopt.recipe import C, Recipe, parse_passes, run_folder

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What ``memopt run`` reads. A task subclasses it with fields of its own; every field is an option."""

    batch_size: int = 16
    """Samples per call of the model, whatever the number of processes."""
    passes: tuple[str, ...] = ()
    """memopt passes, by name: ``channels_last,amp:dtype=bf16``."""
    seed: int = 0
    """Determines everything random."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError("batch_size must be at least 1")
        if self.seed < 0:
            raise InputError("seed must not be negative")


T = TypeVar("T", bound=TaskConfig)


@dataclass(frozen=True)
class Weights:
    """The weights a task works with."""

    path: Path
    """The safetensors file."""
    sha256: str
    run: Path | None
    """The run folder it belongs to."""
    step: int | None
    """After how many steps they were saved; None where no checkpoint has them."""


@dataclass(frozen=True)
class Job(Generic[C, T]):
    """What a task is given. Lines and progress appear in the main process only."""

    recipe: Recipe[C]
    config: C
    options: T
    model: nn.Module
    """In eval mode on the device, with its weights and the passes of the options; each process has a whole one."""
    handle: core.Handle
    """Of the passes."""
    weights: Weights
    accelerator: Any
    """accelerate's Accelerator: the device, the processes, and what they tell each other."""
    data: Path | None
    """The user's data; None for the recipe's own source."""
    cache: Path
    """Where prepared data is kept."""
    out: Path
    """The folder to write into. It exists, and no other run writes into it."""
    console: Console
    """Where lines go; quiet in all processes but the main one."""

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return bool(self.accelerator.is_main_process)

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A warning for the user."""
        _warn(self.console, text)

    @contextlib.contextmanager
    def track(self, what: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Show progress: a bar on a terminal, elsewhere a line at most every 10 seconds and one at the end.

        ``with job.track("translating", 620, "slices") as advance:`` gives a function to tell how many more are done.
        """
        from memopt.runlog import bar

        with bar(self.console) as progress:
            row = progress.add_task(what, total=total, status=unit)
            done, said = 0, time.monotonic()

            def advance(more: int) -> None:
                nonlocal done, said
                done += more
                progress.update(row, completed=done)
                if not self.console.is_terminal and (time.monotonic() - said > 10 or done >= total):
                    said = time.monotonic()
                    self.say(f"{what} {done}/{total} {unit}".rstrip())

            yield advance


def _warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)


class Task(ABC, Generic[C, T]):
    """Something a recipe does with trained weights: ``C`` is the recipe's configuration, ``T`` the task's own."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line, for the list of tasks."""

    @abstractmethod
    def options(self, config: C) -> T:
        """The task's options for this configuration of the recipe, before the user changes any."""

    @abstractmethod
    def run(self, job: Job[C, T]) -> None:
        """Carry it out, in every process; only the main one writes files."""


def run_task(
    recipe: Recipe[C],
    task: Task[C, T],
    config: C,
    options: T,
    *,
    checkpoint: Path | None = None,
    out: Path | None = None,
    data: Path | None = None,
    cache: Path = Path("data"),
) -> None:
    """Load the weights and carry out a task with them.

    The global random generators are seeded, alike in all processes.

    Args:
        checkpoint: a run folder, one checkpoint in it, or a safetensors file; None for the run folder of the recipe's
            first preset.
        out: the folder the task writes into; None for one with the task's name in the run folder, or
            ``runs/RECIPE-TASK`` where the weights belong to no run.
        data: the user's data, in the form the recipe reads; None for the recipe's own source.
        cache: where prepared data is kept.

    Raises:
        InputError: no weights, damaged ones or those of another model; or ``out`` cannot be written into, or another
            run does so.
    """
    from accelerate.utils import set_seed
    from rich.console import Console

    from memopt.training import make_accelerator, seed_for

    accelerator = make_accelerator()
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    weights = find_weights(checkpoint or run_folder(recipe, None), functools.partial(_warn, console))
    if out is None:
        out = weights.run / task.name if weights.run else Path("runs") / f"{recipe.name}-{task.name}"
    set_seed(seed_for(config.seed, "model"))
    with blaming(f"recipe {recipe.name}: model(...) failed"):
        model = recipe.model(config)
    _load(weights.path, model)
    model.to(accelerator.device).eval()
    handle = core.apply(model, parse_passes(options.passes))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the output folder {out}: {error}. Choose another --out") from None
    job = Job(
        recipe=recipe,
        config=config,
        options=options,
        model=model,
        handle=handle,
        weights=weights,
        accelerator=accelerator,
        data=data,
        cache=cache,
        out=out,
        console=console,
    )
    with files.only_one(out) if job.is_main else contextlib.nullcontext():
        parameters = sum(p.numel() for p in model.parameters())
        processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        step = "" if weights.step is None else f" of step {weights.step}"
        job.say(
            f"{recipe.name} {task.name}: {parameters:,} parameters on {accelerator.device}{processes}, weights{step} "
            f"from {weights.path}; output folder {out}"
        )
        if handle.passes:
            job.say(str(handle.report()))
        set_seed(seed_for(options.seed, task.name))
        task.run(job)
        accelerator.wait_for_everyone()  # no process leaves the group while another still works
    accelerator.end_training()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a run folder, one of its checkpoints or a file of weights belongs to; None if to none."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if folder.resolve().parent.name == "checkpoints":
        folder = folder.resolve().parent.parent
    return folder if (folder / "config.json").is_file() else None


def find_weights(checkpoint: Path, warn: Callable[[str], None]) -> Weights:
    """The weights in a run folder, in one checkpoint, or in a safetensors file: averaged ones where there are any.

    A run that was interrupted has those of its newest whole checkpoint; broken ones are named to ``warn``.

    Raises:
        InputError: there are none, or the checkpoint is broken.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if checkpoints.is_one(folder):
        if broken := checkpoints.verify(folder):
            raise InputError(f"checkpoint {folder} is broken ({broken}); give another --checkpoint")
    elif checkpoint.is_dir() and _best(folder) is None and (newest := checkpoints.newest(folder / "checkpoints", warn)):
        folder = newest.path
    file = _best(folder) if checkpoint.is_dir() else checkpoint
    if file is None or not file.is_file():
        raise InputError(f"{checkpoint} has no weights; train first: memopt train DIR --preset P, or give --checkpoint")
    run, digest = run_of(checkpoint), checkpoints.sha256(file)
    step = checkpoints.step_of(digest, folder, *([run / "checkpoints"] if run else []))
    return Weights(path=file, sha256=digest, run=run, step=step)


def _best(folder: Path) -> Path | None:
    return next((f for name in ("ema", "model") if (f := folder / f"{name}.safetensors").is_file()), None)


def _load(file: Path, model: nn.Module) -> None:
    """Load weights, or raise an InputError: they are no safetensors, another model's, or not finite."""
    from safetensors import SafetensorError

    try:
        checkpoints.load_weights(file, model)
    except SafetensorError as error:
        raise InputError(f"{file} is no whole safetensors file ({error}); give another --checkpoint") from None
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(
            f"{file} holds weights that are not finite ({bad[0]}, {len(bad)} in all); give an earlier --checkpoint, or "
            "train again with a lower lr"
        )
