"""A training step that runs out of memory is run again with less, and nothing of it is lost.

Until the optimizer steps, a step has changed nothing but gradients and buffers. So when memory runs out there, in a
forward or a backward, on a GPU or under ``memopt.memory.limit``, the guard drops the gradients, puts the buffers back,
lets go of what the exception holds, and runs the same step on the same data again:

- with the plan for a smaller budget, where the run has one (``--budget``), or else
- with half the microbatch: gradients of the same batch, accumulated in more parts, to rounding the same.

Whatever it tries is strictly smaller than what it tried before, so it ends; then with an error that says what was
tried. In the optimizer's part of a step it goes on only if no weight and no state has changed yet, which is so where
the states were being made, in a first step. Several processes would wait for each other: there the error goes through.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.errors import DoesNotFit, MemoptError
from memopt.units import format_bytes

if TYPE_CHECKING:
    from memopt.planning import Plan
    from memopt.recipe import Recipe, TrainConfig
    from memopt.training import Trainer

PLAN = "plan.toml"
"""In the run folder."""
TIGHTER = 0.9
"""The next budget, as a share of the peak that was planned and did not fit."""


class Guard:
    """Runs the steps of one trainer.

    Args:
        trainer: whose ``train_step`` is called.
        replan: makes a plan for a budget in bytes; None if the run has no plan.
        warn: told what happened.
        keep: the file of the run's plan, where others are written, too.
    """

    def __init__(
        self,
        trainer: Trainer,
        replan: Callable[[int], Plan] | None = None,
        warn: Callable[[str], None] = print,
        keep: Path | None = None,
    ) -> None:
        self.trainer, self.replan, self.warn, self.keep = trainer, replan, warn, keep
        self.plan = trainer.plan
        self.tried: list[str] = []

    def step(self, data: dict[str, Any]) -> Tensor:
        """One step, again and again with less until it fits.

        Raises:
            MemoptError: nothing smaller is left to try, or the weights have changed already.
        """
        trainer = self.trainer
        while True:
            before = _Before(trainer)
            try:
                return trainer.train_step(data)
            except torch.OutOfMemoryError as error:
                if trainer.world > 1:
                    raise
                said = str(error).partition("\n")[0]
                traceback.clear_frames(error.__traceback__)  # they hold the activations
            self.recover(before, said)

    def recover(self, before: _Before, said: str) -> None:
        """Put everything back as it was before the step, and make the next attempt smaller."""
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        whole = before.restore()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        where = f"out of memory in step {trainer.step + 1} ({said})"
        if not whole:
            raise MemoptError(
                f"{where}, while the optimizer was changing weights: this run cannot go on from there. Resume it from "
                "its last checkpoint with a smaller --budget, or with the pass offload_optimizer or optimizer_8bit."
            )
        smaller = self._tighter_plan() or self._smaller_parts()
        if smaller is None:
            tried = f" Tried: {'; '.join(self.tried)}." if self.tried else ""
            raise MemoptError(
                f"{where}, and nothing smaller is left to try.{tried} Use a device with more memory, a smaller model, "
                "or passes that are not exact (--allow amp,optimizer_8bit with --budget)."
            )
        self.tried.append(smaller)
        self.warn(f"{where}; the step runs again with {smaller}")

    def _tighter_plan(self) -> str | None:
        if self.replan is None or self.plan is None:
            return None
        budget = int(self.plan.peak * TIGHTER)
        try:
            plan = self.replan(budget)
        except DoesNotFit:
            self.replan = None
            return None
        self.plan = plan
        self.trainer.use(plan)
        if self.keep is not None:
            plan.save(self.keep)
        return f"a plan for {format_bytes(budget)}, predicted peak {format_bytes(plan.peak)}"

    def _smaller_parts(self) -> str | None:
        rows = self.trainer.config.batch_size // self.trainer.world
        size = self.trainer.microbatch or rows
        if size <= 1:
            return None
        self.trainer.microbatch = (size + 1) // 2
        return f"microbatches of {self.trainer.microbatch}"


class _Before:
    """What a step changes before the optimizer's part of it is done."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in trainer.model.buffers()]
        self.versions = [(p, p._version) for p in trainer.model.parameters()]
        self.states = {
            id(p): [(t, t._version) for t in state.values() if isinstance(t, Tensor)]
            for p, state in trainer.optimizer.state.items()
        }

    def restore(self) -> bool:
        """Put it back; False if weights or the optimizer's states have changed."""
        with torch.no_grad():
            for buffer, kept in self.buffers:
                buffer.copy_(kept)
        state = self.trainer.optimizer.state
        for parameter in [p for p in state if id(p) not in self.states]:  # made in this step
            del state[parameter]
        known = [pair for pairs in self.states.values() for pair in pairs]
        return all(tensor._version == version for tensor, version in (*self.versions, *known))


def plan_for(
    recipe: Recipe[Any],
    config: TrainConfig,
    out: Path,
    *,
    resume: bool,
    data: Path | None,
    cache: Path,
    accelerator: Any,
) -> tuple[Plan | None, Callable[[int], Plan] | None]:
    """The plan of a run with a budget, which ``plan.toml`` in its folder keeps, and how to make others."""
    if config.budget is None:
        return None, None
    from rich.console import Console

    from memopt.estimate import default_device, quiet, recipe_work
    from memopt.hardware import hardware_for
    from memopt.planning import Plan
    from memopt.planning.planner import Search
    from memopt.recipe import parse_passes
    from memopt.units import parse_bytes

    file, device = out / PLAN, default_device()
    made: list[Search] = []

    def replan(budget: int) -> Plan:
        if not made:
            work = recipe_work(recipe, config, train=True, device=device, real=False, data=data, cache=cache)
            made.append(
                Search(
                    work,
                    train=True,
                    device=device,
                    hardware=hardware_for(None, device),
                    allow=config.allow,
                    given=parse_passes(config.passes),
                )
            )
        with quiet(), Console(stderr=True).status("planning") as status:
            made[0].say = status.update
            return made[0].plan(budget)

    def first() -> Plan:
        budget = parse_bytes(config.budget or "", "budget")
        if resume and file.exists():
            stored = Plan.load(file)
            if stored.budget <= budget:  # smaller where memory ran out
                return stored
        return replan(budget)

    if accelerator.num_processes == 1:
        return first(), replan
    from accelerate.utils import broadcast_object_list

    box = [first() if accelerator.is_main_process else None]
    return broadcast_object_list(box)[0], None
