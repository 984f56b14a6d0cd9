"""What each pass of a set contributes: the rows of ``memopt ablate``, measured.

A row is a set of passes. There is one without any, one for each pass alone, one for all that go together but each, one
for all. A pass that fails alone is not in the last two, nor is one that is refused beside those before it; that has a
row *all + pass*, which holds the reason. Whatever fails, the other rows are there.

Three things are measured. Memory, by a profile of the row. Errors, on true steps: three, from the same weights, batch
and random states for every row. The second has the weights that the first one's optimizer made, and shows what passes
learn in a first call; the third has those that the optimizer made from the states it kept. Time, on true steps as well:
rounds over all rows, in each of which every row runs a step to warm up and one that counts. What else the machine does
in the meantime meets all rows alike, which copies of the model, one for each row, would buy with memory.

Trained parameters that are all zero, as the last layers of diffusion models are before training, are filled with small
random numbers for these steps: they would hide any error in what lies before them.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memopt import core
from memopt.errors import InputError, MemoptError, blaming
from memopt.memory import fake
from memopt.memory.profiler import Work
from memopt.memory.report import MemoryReport
from memopt.memory.restore import restored
from memopt.registry import Context, Pass, available_passes, exactness

Profile = Callable[[Sequence[Pass]], MemoryReport]
Progress = Callable[[str, int, int], None]
"""Is told what goes on: a text, how much of it is done, and of how much."""
CHECKED_STEPS = 3
ROUNDING = 1e-3
"""Errors of exact passes stay below this. Rounding itself is much smaller; but Adam makes steps of full size of
gradients that are nothing but rounding, which the later checked steps see."""
OUT_OF_MEMORY = "out of memory"
"""Begins the problem of a row for which the machine was too small, which says nothing against its passes."""


@dataclass
class Row:
    """A set of passes and what was measured with it; None is what was not."""

    name: str
    kind: str
    """``none``, ``one``, ``all but one``, ``all``, or ``refused`` (all that go together, and one that does not)."""
    passes: tuple[Pass, ...]
    problem: str = ""
    """Why there are no figures, or only some."""
    report: MemoryReport | None = None
    seconds: list[float] = field(default_factory=list)
    """Of the steps that count, one of each round."""
    loss_error: float | None = None
    """The largest over the checked steps, relative to the untouched model's loss."""
    gradient_error: float | None = None
    """The largest difference of two entries, relative to the largest entry of all gradients of that step."""
    bitwise: bool | None = None
    """Whether losses and gradients of the checked steps are those of the untouched model bit for bit."""
    notes: tuple[str, ...] = ()
    """What the pass says of itself, if there is one; and whether the scaler skipped steps."""

    @property
    def median(self) -> float | None:
        """Seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def exactness(self) -> str:
        """What the passes promise together."""
        promised = {exactness(pass_) for pass_ in self.passes}
        return next((text for text in ("not exact", "exact to rounding") if text in promised), "exact")


@dataclass(frozen=True)
class Ablation:
    """What ``ablate`` found."""

    rows: tuple[Row, ...]
    """The first has no passes."""
    about: Mapping[str, str]
    """What was measured, with what, on what, when."""
    left_out: Mapping[str, str]
    """Passes that nobody asked for by name, and why they are in no row."""

    def peak_ratio(self, row: Row) -> float | None:
        """The peak relative to that without passes."""
        plain = self.rows[0].report
        return None if row.report is None or plain is None else row.report.peak / max(1, plain.peak)

    def time_ratio(self, row: Row) -> float | None:
        """The time of a step relative to that without passes."""
        plain, median = self.rows[0].median, row.median
        return None if plain is None or median is None else median / plain

    @property
    def steady(self) -> bool:
        """Whether the model itself repeats its steps, but for rounding. If not, errors say nothing."""
        return _small(self.rows[0])

    def breaks(self, row: Row) -> bool:
        """Whether errors are larger than the passes of the row promise."""
        if not self.steady or row.exactness == "not exact":
            return False
        return not _small(row) or (row.exactness == "exact" and row.bitwise is False and self.rows[0].bitwise is True)

    def front(self) -> list[Row]:
        """The Pareto front: rows than which no other is better in peak or time, and in the other no worse."""
        known = [(row.report.peak, row.median, row) for row in self.rows if row.report and row.median is not None]
        return [
            row
            for peak, seconds, row in known
            if not any(p <= peak and s <= seconds and (p, s) != (peak, seconds) for p, s, _ in known)
        ]


def applicable(work: Work, *, train: bool) -> tuple[list[Pass], dict[str, str]]:
    """The exact passes that find something to do here, with their default options; the others, and why."""
    found: list[Pass] = []
    others: dict[str, str] = {}
    for name, cls in available_passes().items():
        if problem := _other_mode(cls, train):
            others[name] = problem
            continue
        try:
            pass_ = cls()
            claims = pass_.plan(work.model, Context(_optimizers(work)))
        except (MemoptError, TypeError, ImportError) as error:
            others[name] = str(error)
            continue
        if not claims:
            others[name] = f"finds nothing to do; it needs {pass_.wanted()}"
        elif not pass_.exact:
            others[name] = "not exact; name it to have it"
        elif pass_.not_by_default:
            others[name] = f"{pass_.not_by_default}; name it to have it"
        else:
            found.append(pass_)
    return found, others


def single_rows(passes: Sequence[Pass], *, train: bool) -> list[Row]:
    """The row without passes and those of each alone.

    Raises:
        InputError: a pass is there twice, with the same options.
    """
    rows = [Row("none", "none", ()), *(Row(_name(p), "one", (p,)) for p in passes)]
    for row in rows[1:]:
        if sum(row.name == other.name for other in rows) > 1:
            raise InputError(f"{row.name} is given twice; a pass has one row")
        row.problem = _other_mode(type(row.passes[0]), train)
    return rows


def rows_together(ones: Sequence[Row], fits: Callable[[Sequence[Pass]], bool]) -> list[Row]:
    """The rows of several passes, of those that did not fail alone; ``fits`` says whether some go together."""
    together: list[Pass] = []
    refused: list[Pass] = []
    for row in ones:
        if not row.problem or row.problem.startswith(OUT_OF_MEMORY):
            (together if fits([*together, *row.passes]) else refused).extend(row.passes)
    rows: list[Row] = []
    if len(together) > 2:
        rows += [Row(f"all but {_name(p)}", "all but one", tuple(q for q in together if q is not p)) for p in together]
    if len(together) > 1:
        rows.append(Row("all", "all", tuple(together)))
    beside = "all" if len(together) > 1 else "".join(map(_name, together))
    return rows + [Row(f"{beside} + {_name(p)}", "refused", (*together, p)) for p in refused if together]


def go_together(work: Work, passes: Sequence[Pass]) -> bool:
    """Whether passes can be applied to the model at once; they are taken off again."""
    with fake.mode_of(work.model) or contextlib.nullcontext(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(core.apply(work.model, list(passes), optimizer=_optimizers(work)))
        except Exception:  # a row says which
            return False
    return True


def ablate(
    passes: Sequence[Pass],
    fits: Callable[[Sequence[Pass]], bool],
    profile: Profile,
    work: Work | None,
    *,
    train: bool,
    seed: int = 0,
    errors: bool = True,
    repeats: int = 3,
    progress: Progress = lambda text, done, of: None,
) -> list[Row]:
    """The rows for these passes, measured; the first has none.

    Args:
        fits: says whether passes go together.
        profile: profiles a step with passes.
        work: a step on true tensors, to be left as it is but for trained parameters that are all zero; None: nothing
            but memory is measured.
        errors: run steps to compare loss and gradients.
        repeats: rounds of steps that are timed; 0 for none.

    Raises:
        InputError: a pass is there twice.
        MemoptError: the model fails without passes.
    """
    rows = single_rows(passes, train=train)
    if work is not None:
        _fill_zeros(work.model, seed)
    expected: list[_Result] | None = None

    def measure(rows: Sequence[Row]) -> None:
        nonlocal expected
        for row in _each(rows, "memory", progress):
            with _noting(row):
                row.report = profile(row.passes)
        if work is None or not errors:
            return
        for row in _each(rows, "errors", progress):
            with _noting(row):
                found, row.notes = _results(work, row.passes, train, seed)
                if row.kind == "none":  # of two runs without passes the second shows what the machine itself varies
                    expected, (found, _) = found, _results(work, (), train, seed)
                if expected is not None:
                    row.loss_error, row.gradient_error, row.bitwise = _compare(expected, found)

    measure(rows)
    more = rows_together(rows[1:], fits)
    measure(more)
    rows += more
    if work is None:
        return rows
    for i in range(repeats):
        for row in _each(rows, f"times, round {i + 1} of {repeats}", progress):
            with _noting(row):
                row.seconds.append(_seconds(work, row.passes, train, seed))
    for row in rows:
        if row.problem:  # not over the same rounds as the others
            row.seconds.clear()
    return rows


def _name(pass_: Pass) -> str:
    return str(pass_).removesuffix("()")


def _optimizers(work: Work) -> tuple[torch.optim.Optimizer, ...]:
    return () if work.optimizer is None else (work.optimizer,)


def _other_mode(cls: type[Pass], train: bool) -> str:
    """What is wrong with measuring such a pass in training, or in inference; nothing is an empty text."""
    return "" if ("train" if train else "infer") in cls.modes else f"for {' and '.join(sorted(cls.modes))} only"


def _small(row: Row) -> bool:
    """Whether its errors, if there are any, are those of rounding."""
    return all(error is None or error <= ROUNDING for error in (row.loss_error, row.gradient_error))


def _fill_zeros(model: nn.Module, seed: int) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.05)


def _each(rows: Sequence[Row], text: str, progress: Progress) -> Iterator[Row]:
    for i, row in enumerate(rows):
        if not row.problem:
            progress(f"{text}: {row.name}", i, len(rows))
            yield row
    progress(text, len(rows), len(rows))


@contextlib.contextmanager
def _noting(row: Row) -> Iterator[None]:
    """What fails with passes stands in the row. What fails without is an error, unless memory is all that lacks."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        row.problem = f"{OUT_OF_MEMORY}: {str(error).partition('.')[0]}"
    except Exception as error:
        if row.kind == "none":
            with blaming("a step without passes failed"):
                raise
        told = str(error).strip().partition("\n")[0]
        row.problem = told if isinstance(error, MemoptError) else f"{type(error).__name__}: {told}"


@contextlib.contextmanager
def _applied(work: Work, passes: Sequence[Pass]) -> Iterator[core.Handle]:
    """The passes on the model, which is as it was afterwards, weights and optimizer included."""
    batch = [leaf for leaf in tree_leaves(work.batch) if isinstance(leaf, Tensor)]
    with (
        restored(work.model, work.optimizer, work.extra, batch),
        core.apply(work.model, list(passes), optimizer=_optimizers(work)) as handle,
    ):
        yield handle


def _step(work: Work, train: bool, seed: int, handle: core.Handle) -> Tensor:
    """One step as a training loop does it; returns its loss."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    work.model.train(train)
    scaler = handle.scaler or torch.amp.GradScaler(enabled=False)
    losses: list[Tensor] = []
    with torch.set_grad_enabled(train):
        for part in work.parts(work.batch) if work.parts is not None else [work.batch]:
            loss = work.forward(work.model, part)
            if loss is None or (train and not loss.requires_grad):
                raise InputError("the loss does not depend on any parameter")
            losses.append(loss.detach())
            if train:
                scaler.scale(loss).backward()
                if work.parts is not None or work.before_step is not None:
                    _need_gradients(work.model)
            del loss
    if train and work.optimizer is not None:
        if work.before_step is not None:
            scaler.unscale_(work.optimizer)
            work.before_step(work.model)
        scaler.step(work.optimizer)
        scaler.update()
        work.optimizer.zero_grad()
    if train and work.after is not None:
        work.after(work.model)
    return torch.stack(losses).sum()


def _need_gradients(model: nn.Module) -> None:
    """Raise a MemoptError if a pass took the gradients of a loop that needs all of them after backward."""
    if all(parameter.grad is None for parameter in model.parameters()):
        raise MemoptError(
            "no gradients are left after backward, but this loop clips them or adds up those of microbatches: leave "
            "out grad_clip and microbatch, or the pass that takes the gradients"
        )


@dataclass(frozen=True)
class _Result:
    """What a step gives, on the CPU."""

    loss: Tensor
    gradients: dict[str, Tensor]


def _results(work: Work, passes: Sequence[Pass], train: bool, seed: int) -> tuple[list[_Result], tuple[str, ...]]:
    """Loss and gradients of some steps, one after the other, and what there is to say about them."""
    skipped = 0
    found: list[_Result] = []
    gradients: dict[str, Tensor] = {}
    scale = 1.0

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.detach()
            gradients[name] = ((gradient.to_dense() if gradient.is_sparse else gradient) / scale).cpu()

        return hook

    # Before any pass: one that steps and frees a gradient as it arrives comes after.
    hooks = [
        parameter.register_post_accumulate_grad_hook(keep(name))
        for name, parameter in work.model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        with _applied(work, passes) as handle:
            for i in range(CHECKED_STEPS):
                gradients = {}
                scale = handle.scaler.get_scale() if handle.scaler is not None else 1.0
                loss = _step(work, train, seed + i, handle)
                if work.optimizer is None:
                    work.model.zero_grad()
                skipped += handle.scaler is not None and handle.scaler.get_scale() < scale
                found.append(_Result(loss.cpu(), gradients))
            notes = list(handle.report().rows[0].notes) if len(passes) == 1 else []
    finally:
        for hook in hooks:
            hook.remove()
    if skipped:
        notes.append(f"gradients overflowed in fp16, and the scaler skipped {skipped} of {CHECKED_STEPS} checked steps")
    return found, tuple(notes)


def _compare(expected: Sequence[_Result], found: Sequence[_Result]) -> tuple[float, float | None, bool]:
    """Error of loss, error of gradients (None if there are none), and whether all is equal bit for bit."""
    losses, gradients, bitwise = [], [], True
    for a, b in zip(expected, found, strict=True):
        losses.append(_largest(a.loss, b.loss) / (abs(a.loss.item()) or 1.0))
        bitwise &= _same(a.loss, b.loss) and a.gradients.keys() == b.gradients.keys()
        if a.gradients.keys() != b.gradients.keys():
            gradients.append(math.inf)
            continue
        whole = max((g.abs().max().item() for g in a.gradients.values() if g.numel()), default=0.0) or 1.0
        for name, gradient in a.gradients.items():
            bitwise &= _same(gradient, b.gradients[name])
            gradients.append(_largest(gradient, b.gradients[name]) / whole)
    return _worst(losses), _worst(gradients) if gradients else None, bitwise


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _largest(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float64)
    a, b = a.to(wide), b.to(wide)
    return torch.where(a == b, 0.0, (a - b).abs()).max().item()  # the same infinity is no error


def _worst(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _seconds(work: Work, passes: Sequence[Pass], train: bool, seed: int) -> float:
    with _applied(work, passes) as handle:
        _step(work, train, seed, handle)
        _wait(work.model)
        start = time.perf_counter()
        _step(work, train, seed + 1, handle)
        _wait(work.model)
        return time.perf_counter() - start


def _wait(model: nn.Module) -> None:
    if torch.cuda.is_available() and any(p.is_cuda for p in model.parameters()):
        torch.cuda.synchronize()


def provenance(**more: Any) -> dict[str, str]:
    """What a figure depends on besides its subject: machine, versions, date; and ``more``, before these."""
    import datetime
    import os
    import platform

    import memopt

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        **{name: str(value) for name, value in more.items()},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "memopt": memopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": gpu,
    }


def _processor() -> str:
    import platform
    from pathlib import Path

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
