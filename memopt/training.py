"""The training loop: any Recipe, one process or several, resumable bit for bit.

Randomness has no history. Every step seeds the generators from (seed, step, process), the data order of an epoch comes
from (seed, epoch), and the draws of a batch (noise, time steps, dropped conditions) from (seed, step), for the whole
batch over all processes, of which each process takes its rows. Hence a resumed run needs no generator states to equal
an uninterrupted one, and neither the microbatch size nor the number of processes changes what is computed (a model's
own dropout masks apart).

accelerate places the model and wraps it for torchrun; mixed precision is a memopt pass (``amp``), whose scaler, if it
has one, is used here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler

from memopt import checkpoints, core, files, plots
from memopt.errors import InputError, MemoptError, blaming
from memopt.guard import PLAN, Guard, plan_for
from memopt.memory.leaks import LeakWatch
from memopt.passes import OptimizerInBackward
from memopt.planning import Plan
from memopt.recipe import Recipe, TrainConfig, parse_passes
from memopt.runlog import RunLog

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    out: Path
    step: int
    losses: list[float]


def seed_for(*parts: object) -> int:
    """A 32-bit seed from anything with a stable text form."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "little")


def make_accelerator() -> Any:
    """accelerate's Accelerator: the device, and the other processes if torchrun started several."""
    from accelerate import Accelerator

    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return Accelerator(cpu=not accelerated, step_scheduler_with_optimizer=False)


class Batches(Sampler[list[int]]):
    """The rows of each step's batch that one process reads: an endless shuffled stream, cut into batches.

    Step ``s`` takes samples ``s * batch`` up to ``(s + 1) * batch`` of the stream, which runs through one permutation
    of the data set after another; process r takes the r-th part of them.
    """

    def __init__(self, size: int, batch: int, seed: int, steps: range, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch, self.seed, self.steps = size, batch, seed, steps
        self.rows = slice(rank * batch // world, (rank + 1) * batch // world)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch
            yield [self._sample(i) for i in range(first, first + self.batch)][self.rows]

    def __len__(self) -> int:
        return len(self.steps)

    def _sample(self, position: int) -> int:
        epoch, index = divmod(position, self.size)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", epoch))
            self._epoch = (epoch, torch.randperm(self.size, generator=generator).tolist())
        return self._epoch[1][index]


class Trainer:
    """One run. ``train`` below drives it; its parts are methods so that tests can look at gradients."""

    def __init__(
        self, recipe: Recipe[Any], config: TrainConfig, *, data: Path | None, cache: Path, plan: Plan | None = None
    ) -> None:
        from accelerate.utils import set_seed

        self.accelerator = make_accelerator()
        self.recipe, self.config, self.plan = recipe, config, plan
        self.microbatch = config.microbatch
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % self.world:
            raise InputError(f"batch size {config.batch_size} cannot be shared evenly by {self.world} processes")
        self.dataset: Dataset[Any] = recipe.dataset(config, data, cache)
        self.size = len(self.dataset)  # type: ignore[arg-type]
        if config.batch_size > self.size:
            raise InputError(f"batch size {config.batch_size} is larger than the data set of {self.size} samples")

        set_seed(seed_for(config.seed, "model"))
        with blaming(f"recipe {recipe.name}: model(...) failed"):
            model = recipe.model(config)
        self.model: nn.Module = model.to(self.accelerator.device)
        self.step = 0
        self.ema: AveragedModel | None = None
        if config.ema_decay is not None:
            device = torch.device("cpu") if config.ema_device == "cpu" else None
            self.ema = AveragedModel(self.model, device=device, multi_avg_fn=self._average)
        self.optimizer = recipe.optimizer(config, self.model)
        passes = parse_passes(config.passes) if plan is None else plan
        self.handle = core.apply(self.model, passes, optimizer=self.optimizer)
        if any(isinstance(pass_, OptimizerInBackward) for pass_ in self.handle.passes):
            self._check_steps_in_backward()
        self.scaler = self.handle.scaler or torch.amp.GradScaler(self.accelerator.device.type, enabled=False)
        self.parallel: nn.Module = self.accelerator.prepare(self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)

    def use(self, plan: Plan) -> None:
        """Have the passes of another plan."""
        self.handle.undo()
        self.plan, self.handle = plan, core.apply(self.model, plan, optimizer=self.optimizer)

    def _check_steps_in_backward(self) -> None:
        """Refuse what needs all gradients of a step at once."""
        config = self.config
        needs = {
            f"grad_clip={config.grad_clip}": config.grad_clip is not None,
            f"microbatch={config.microbatch}": (config.microbatch or config.batch_size) < config.batch_size,
            f"{self.world} processes": self.world > 1,
        }
        if found := [what for what, needed in needs.items() if needed]:
            raise InputError(
                f"optimizer_in_backward steps each parameter when its gradient arrives, but {' and '.join(found)} need "
                "all gradients before a step. Leave the pass out, or set grad_clip=none and microbatch=none in one "
                "process (the pass grad_accumulation splits a batch and goes with it)."
            )

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return bool(self.accelerator.is_main_process)

    def loader(self, steps: range) -> DataLoader[Any]:
        """The batches of these steps for this process."""
        config = self.config
        workers = min(config.num_workers, os.cpu_count() or 1)
        return DataLoader(
            self.dataset,
            batch_sampler=Batches(self.size, config.batch_size, config.seed, steps, self.rank, self.world),
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            # A recipe's modules have no name that a new interpreter could import.
            multiprocessing_context="fork" if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def train_step(self, data: dict[str, Any]) -> Tensor:
        """One optimizer step on this process's rows of the batch; returns their mean loss, on the device."""
        loss = self.backward(data)
        if self.config.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss

    def backward(self, data: dict[str, Any]) -> Tensor:
        """The gradients of one step, accumulated over microbatches as if they were one batch."""
        from accelerate.utils import set_seed

        config, device = self.config, self.accelerator.device
        set_seed(seed_for(config.seed, "step", self.step, self.rank))
        self.model.train()
        generator = torch.Generator().manual_seed(seed_for(config.seed, "draw", self.step))
        draws = self.recipe.draw(config, config.batch_size, generator)
        rows = config.batch_size // self.world
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        batch = {**data, **{name: tensor[mine] for name, tensor in draws.items()}}
        batch = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
        size = self.microbatch or rows
        total = torch.zeros((), device=device)
        for start in range(0, rows, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            share = min(size, rows - start) / rows
            last = start + size >= rows
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.parallel):
                loss = self.recipe.loss(config, self.parallel, part) * share
                self.accelerator.backward(self.scaler.scale(loss))
            total += loss.detach()
        return total

    def save(self, folder: Path) -> None:
        """Write a checkpoint (main process only; the others go on)."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise MemoptError(
                f"the weights are not finite after step {self.step}; they are not saved. Lower lr or set grad_clip; "
                "the checkpoints before it are kept."
            )
        if not self.is_main:
            return
        modules = {"model": self.model} if self.ema is None else {"model": self.model, "ema": self.ema.module}
        state = {
            "recipe": self.recipe.name,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with self.handle.phase("checkpoint"):
            checkpoints.save(
                folder,
                self.step,
                modules=modules,
                optimizer=self.optimizer,
                state=state,
                keep=self.config.keep,
            )

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is another model's, or lacks an average that this run needs.
        """
        path = checkpoint.path
        if self.ema is not None and not (path / "ema.safetensors").is_file():
            raise InputError(f"{path} has no EMA weights, but this run keeps an average; set ema_decay=none")
        checkpoints.load_weights(path / "model.safetensors", self.model)
        if self.ema is not None:
            checkpoints.load_weights(path / "ema.safetensors", self.ema.module)
            self.ema.n_averaged.fill_(checkpoint.step)
        # What the configuration says (learning rate, weight decay) holds, also where it was changed for this resume.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        base = list(self.scheduler.base_lrs)
        self.optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        self.scheduler.base_lrs = base
        for group, configured, lr in zip(self.optimizer.param_groups, options, base, strict=True):
            group.update(configured)
            group["lr"] = lr * self._lr_factor(checkpoint.step)
        if self.scaler.is_enabled() and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step = checkpoint.step

    def sample(self, file: Path) -> bool:
        """Draw the recipe's sample grid with the averaged weights; False if it has none."""
        if not self.is_main:
            return False
        from accelerate.utils import set_seed

        set_seed(seed_for(self.config.seed, "sample"))
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "sample"))
        with self.handle.phase("sampling"), self._averaged(), torch.no_grad():
            self.model.eval()
            grid = self.recipe.sample(self.config, self.model, generator)
            self.model.train()
            if grid is None:
                return False
            plots.sample_grid(dataclasses.replace(grid, title=grid.title or f"step {self.step}"), file)
        return True

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with the averaged weights; exchanged in place, so that no third copy exists."""
        if self.ema is None:
            yield
            return
        self._exchange(self.ema)
        try:
            yield
        finally:
            self._exchange(self.ema)

    @torch.no_grad()
    def _exchange(self, ema: AveragedModel) -> None:
        for live, average in zip(self.model.parameters(), ema.module.parameters(), strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)

    def _average(self, averages: Any, weights: Any, _: Any) -> None:
        assert self.config.ema_decay is not None
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _lr_factor(self, step: int) -> float:
        config = self.config
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        return warm * (1 - step / config.steps if config.lr_anneal else 1.0)


def train(
    recipe: Recipe[Any],
    config: TrainConfig,
    *,
    out: Path,
    data: Path | None = None,
    cache: Path = Path("data"),
    resume: bool = False,
) -> Result:
    """Train a recipe and leave a run folder.

    The folder holds ``model.safetensors``, ``ema.safetensors``, ``config.json``, ``metrics.jsonl`` (one line per step),
    ``loss.png``, ``samples/`` with the newest grid as ``samples.png``, TensorBoard files and ``checkpoints/``.

    Args:
        out: the run folder.
        data: the user's data, in the form the recipe reads; None for the recipe's own source.
        cache: where prepared data is kept.
        resume: go on from the newest whole checkpoint in ``out``; from the start if there is none.

    Raises:
        InputError: bad configuration or data, or ``out`` holds a run and ``resume`` is False.
        MemoptError: the loss is not finite, or a checkpoint could not be written.
    """
    if not resume and ((out / "metrics.jsonl").exists() or checkpoints.exist(out / "checkpoints")):
        raise InputError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {out}: {error}. Choose another --out") from None
    plan, replan = plan_for(recipe, config, out, resume=resume, data=data, cache=cache, accelerator=make_accelerator())
    trainer = Trainer(recipe, config, data=data, cache=cache, plan=plan)
    try:
        with files.only_one(out) if trainer.is_main else contextlib.nullcontext():
            return _run(trainer, out, resume, data, replan)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MemoptError(f"cannot write in {out}: {error}. The checkpoints in it are untouched.") from error


def _same_data(trainer: Trainer, out: Path) -> None:
    """A run goes on with the data it began with."""
    try:
        before = json.loads((out / "config.json").read_text())["samples"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != trainer.size:
        raise InputError(
            f"{out} was trained on {before} samples, but there are {trainer.size} now: give the --data of that run"
        )


def _run(trainer: Trainer, out: Path, resume: bool, data: Path | None, replan: Callable[[int], Plan] | None) -> Result:
    folder, steps = out / "checkpoints", trainer.config.steps
    with RunLog(out, steps, main=trainer.is_main) as log:
        found = checkpoints.newest(folder, log.warn) if resume else None
        if found is not None:
            _same_data(trainer, out)
            trainer.restore(found)
            log.say(f"resuming from {found.path}")
        if trainer.step > steps:
            raise InputError(f"{out} is at step {trainer.step} already, beyond --steps {steps}")
        if trainer.is_main:
            checkpoints.discard_after(folder, trainer.step)
            checkpoints.write_text(out / "config.json", json.dumps(_describe(trainer, data), indent=1, default=str))
        log.rewind(trainer.step)
        log.start(trainer)
        if trainer.plan is not None:
            log.say(str(trainer.plan))
            if trainer.is_main:
                trainer.plan.save(out / PLAN)
        _loop(trainer, log, out, Guard(trainer, replan, log.warn, out / PLAN))
        if trainer.is_main:
            _finish(trainer, log, out)
    trainer.accelerator.wait_for_everyone()  # no process leaves the group while another still works
    trainer.accelerator.end_training()
    return Result(out, trainer.step, log.losses)


def _loop(trainer: Trainer, log: RunLog, out: Path, guard: Guard) -> None:
    config, folder = trainer.config, out / "checkpoints"
    pending: list[Tensor] = []
    watch = LeakWatch()
    last = time.perf_counter()
    for data in trainer.loader(range(trainer.step, config.steps)):
        rate = trainer.optimizer.param_groups[0]["lr"]
        pending.append(guard.step(data))
        step, done = trainer.step, trainer.step == config.steps
        saving = done or step % config.save_every == 0
        if saving or step % config.log_every == 0:
            # The only place that waits for the device: losses stay there until they are written.
            losses = trainer.accelerator.reduce(torch.stack(pending), reduction="mean").tolist()
            seconds = (time.perf_counter() - last) / len(losses)
            warning = watch.check(step) if trainer.is_main else None
            log.record(step, losses, lr=rate, samples_per_second=config.batch_size / seconds, warning=warning)
            pending.clear()
            if not all(map(math.isfinite, losses)):
                raise MemoptError(
                    f"the loss is not finite at step {step - len(losses) + 1 + _first_bad(losses)}. Lower lr, set "
                    "grad_clip, or train without amp; the checkpoints before it are kept."
                )
            last = time.perf_counter()
        if saving:
            trainer.save(folder)
        if not done:  # the last one is drawn when everything is saved
            _sample(trainer, log)
        if saving or _samples_due(trainer):
            trainer.accelerator.wait_for_everyone()
            last = time.perf_counter()


def _samples_due(trainer: Trainer) -> bool:
    every = trainer.config.sample_every
    return trainer.step % every == 0 if every else trainer.step == trainer.config.steps


def _sample(trainer: Trainer, log: RunLog) -> None:
    picture = log.file(f"samples/step_{trainer.step:08d}.png")
    if _samples_due(trainer) and trainer.sample(picture):
        checkpoints.publish(picture, log.file("samples.png"))


def _first_bad(losses: list[float]) -> int:
    return next(i for i, loss in enumerate(losses) if not math.isfinite(loss))


def _finish(trainer: Trainer, log: RunLog, out: Path) -> None:
    """The files a user looks for, at the top of the run folder."""
    newest = out / "checkpoints" / f"step_{trainer.step:08d}"
    for name in ("model.safetensors", "ema.safetensors"):
        if (newest / name).is_file():
            checkpoints.publish(newest / name, out / name)
        else:  # of an earlier part of the run that kept an average
            (out / name).unlink(missing_ok=True)
    if log.losses:
        title = f"{trainer.recipe.name}: loss over {len(log.losses)} steps"
        plots.loss_curve(log.recorded, log.losses, out / "loss.png", title=title)
    _sample(trainer, log)
    log.summarize()


def _describe(trainer: Trainer, data: Path | None) -> dict[str, Any]:
    import platform

    return {
        "data": None if data is None else str(data.resolve()),
        "samples": trainer.size,
        "recipe": trainer.recipe.name,
        "config": dataclasses.asdict(trainer.config),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "passes": str(trainer.handle.report()),
        "processes": trainer.world,
        "device": str(trainer.accelerator.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
