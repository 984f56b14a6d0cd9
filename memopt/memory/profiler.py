"""``memopt.profile``: run one step of a model, watched by the tracker, and say where the bytes went.

By default the step runs on a copy of fake tensors, which costs no memory and leaves no trace in the model. What runs is
the second step of a loop: the first, unwatched, creates optimizer states and lets passes learn, as in training.
``real=True`` runs both on the model itself and puts weights, buffers, gradients, optimizer states and random
generators back afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memopt import core
from memopt.errors import InputError, MemoptError
from memopt.memory import corrections, cuda, fake, libraries
from memopt.memory.report import MemoryReport
from memopt.memory.restore import restored
from memopt.memory.timeline import Story, tell
from memopt.memory.tracker import Tracker
from memopt.registry import Pass
from memopt.reports import Saving

Loss = Callable[[Any], Tensor]
SCRATCH = "Memory that an operation takes and frees inside itself is not counted."


@dataclass
class Work:
    """What is profiled: a model, and how one step of it goes. A profile copies it whole."""

    model: nn.Module
    batch: Any
    """What ``forward`` gets: nested tensors and anything else."""
    forward: Callable[[nn.Module, Any], Tensor | None]
    """Calls the model on (a part of) the batch; returns the loss in training."""
    optimizer: torch.optim.Optimizer | None = None
    parts: Callable[[Any], Sequence[Any]] | None = None
    """Cuts a batch into the microbatches of a step; None: it is one."""
    before_step: Callable[[nn.Module], object] | None = None
    """What the loop does between backward and the optimizer's step, such as to clip the gradients."""
    after: Callable[[nn.Module], None] | None = None
    """What the loop does after a step, such as to average the weights."""
    extra: tuple[nn.Module, ...] = ()
    """Further modules that live on the device, counted with the optimizer's states."""


def profile(
    model: nn.Module,
    inputs: Any,
    *,
    train: bool = True,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device | None = None,
    passes: Sequence[Any] = (),
    real: bool = False,
    rounding: int | None = None,
    waits: int = 16,
) -> MemoryReport:
    """Where the bytes of one step go.

    Args:
        model: any module, on any device, with passes applied or not, also one on the meta device or built under
            ``FakeTensorMode``. It is left as it is.
        inputs: what it is called with: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a
            tuple of both.
        train: profile a training step (forward, backward, optimizer step); else a forward in eval mode without
            gradients.
        loss: makes a scalar of the model's output. Default: its ``loss`` if it has one, else the mean over all its
            floating tensors.
        optimizer: the optimizer of the model's parameters; its states count also before its first step. Default: the
            one that active passes were given, else none: forward and backward only.
        device: ``"cpu"`` or ``"cuda"``; default: where the model is. The fake profile of ``"cuda"`` needs no GPU: it
            counts what CUDA's kernels keep; what it assumes is in the report.
        passes: passes to profile the model with, besides those that are active on it.
        real: run true steps on the model, on the device where it is, instead of fake ones.
        rounding: count each storage as a multiple of so many bytes. Default: 512 for ``"cuda"``, as its
            allocator does, else 1.
        waits: a tensor is a skip connection if it waits so many calls of leaf modules for its next use.

    Raises:
        InputError: the model cannot be called with these inputs, or the loss is no scalar.
        MemoptError: the model's code needs the values of tensors (``.item()``, data-dependent branches), which fake
            tensors do not have; the message names the line. Use ``real=True``.
    """
    work = make_work(model, inputs, train=train, loss=loss, optimizer=optimizer)
    return profile_work(
        work,
        train=train,
        device=device,
        passes=passes,
        real=real,
        rounding=rounding,
        waits=waits,
        inputs=describe(work.batch),
    )


def make_work(
    model: nn.Module, inputs: Any, *, train: bool, loss: Loss | None, optimizer: torch.optim.Optimizer | None
) -> Work:
    """The step that :func:`profile` describes, its arguments checked."""
    if not isinstance(model, nn.Module):
        raise InputError(f"profile needs a torch.nn.Module, not a {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of the model's output, not a {type(loss).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    if optimizer is not None:
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise InputError(f"the optimizer has none of the parameters of this {type(model).__name__}")
    call = arguments(model, inputs)
    if optimizer is None and train:
        optimizer = next(iter(core.active_passes(model).optimizers), None)

    def forward(model: nn.Module, batch: Any) -> Tensor | None:
        args, kwargs = batch
        output = model(*args, **kwargs)
        if loss is None or not train:
            return default_loss(output) if train else None
        with _explained(model, f"loss failed on the output of {type(model).__name__}, {describe(output)}", True):
            return loss(output)

    return Work(model, call, forward, optimizer if train else None)


def savings_of(
    model: nn.Module, others: Sequence[Pass], passes: Sequence[Pass], inputs: Any, **how: Any
) -> list[Saving]:
    """What each of ``passes`` saves on a model that has ``others`` and those before it; all are active on it."""
    with core.without_passes(model) as active:
        if how.get("optimizer") is None and active.optimizers:
            how["optimizer"] = active.optimizers[0]
        sets = [[*others, *passes[:i]] for i in range(len(passes) + 1)]
        reports = [profile(model, inputs, **{**how, "passes": chosen}) for chosen in sets]
    return [
        Saving(peak=(before.peak, after.peak), kept=(before.kept, after.kept))
        for before, after in itertools.pairwise(reports)
    ]


@dataclass(frozen=True)
class Watched:
    """A step that ran under a tracker."""

    tracker: Tracker
    story: Story
    model: nn.Module
    """The one that ran, perhaps a copy."""
    device: str
    """What kind of device was counted."""
    rounding: int
    passes: tuple[str, ...]
    assumptions: tuple[str, ...]


def watch_work(
    work: Work,
    *,
    train: bool,
    device: str | torch.device | None = None,
    passes: Sequence[Any] = (),
    real: bool = False,
    rounding: int | None = None,
    waits: int = 16,
    weigh: bool = False,
) -> Watched:
    """Run a step under a tracker, and say what it saw; arguments as for :func:`profile`.

    ``weigh``: note the work of each operation, too.
    """
    _check_steps(work.optimizer)
    placed = {t.device.type for t in work.model.parameters()} or {"cpu"}
    kind = _kind(device) if device is not None else "cpu" if "meta" in placed else sorted(placed)[-1]
    if real and kind not in placed:  # weights may live elsewhere, too
        raise InputError(f"a real profile runs where the model is ({', '.join(sorted(placed))}), not on {kind!r}")
    if rounding is None:
        rounding = 512 if kind == "cuda" else 1
    passes = [passes] if isinstance(passes, (str, Mapping, Pass)) else list(passes)
    with torch.inference_mode(False):
        run, tracker = (_on_the_model if real else _on_fakes)(work, train, kind, passes, rounding, weigh)
    story = tell(tracker, run.work.model, waits=waits)
    return Watched(tracker, story, run.work.model, kind, rounding, run.passes, run.assumptions)


def profile_work(
    work: Work,
    *,
    train: bool,
    inputs: str,
    device: str | torch.device | None = None,
    passes: Sequence[Any] = (),
    real: bool = False,
    rounding: int | None = None,
    waits: int = 16,
) -> MemoryReport:
    """As :func:`profile`, for a step that the caller describes; ``inputs`` is what the report says of it."""
    began = time.perf_counter()
    watched = watch_work(work, train=train, device=device, passes=passes, real=real, rounding=rounding, waits=waits)
    tracker, story, kind = watched.tracker, watched.story, watched.device
    timeline = story.timeline
    in_op = story.peak_op >= 0
    phase = next((name for name, first, end in timeline.phases if first <= story.peak_op < end), "start")
    column = {name: values[story.peak_point] for name, values in timeline.bytes.items()}
    return MemoryReport(
        model=type(work.model).__name__,
        train=train,
        device=kind,
        real=real,
        inputs=inputs,
        passes=watched.passes,
        rounding=watched.rounding,
        peak=story.peak,
        peak_point=story.peak_point,
        peak_phase=phase if in_op else "start",
        peak_op=tracker.names[story.peak_op] if in_op else "",
        peak_module=tracker.paths[story.peak_op] if in_op else "",
        peak_by_category=column,
        start_by_category={name: values[0] for name, values in timeline.bytes.items()},
        kept=story.kept,
        off_device=story.off_device,
        largest=story.largest,
        modules=story.modules,
        skips=story.skips,
        timeline=timeline,
        assumptions=watched.assumptions if kind == "cuda" and not real else (SCRATCH, *watched.assumptions),
        seconds=time.perf_counter() - began,
    )


@dataclass
class _Run:
    """The steps of a profile: on a fake copy of the work or on the work itself."""

    work: Work
    train: bool
    device: str
    """Of the tensors that are counted."""
    rounding: int
    weigh: bool
    values: Callable[[], Any] = contextlib.nullcontext
    """Entered around the optimizer's step, which on fake tensors asks for values."""
    fakes: bool = False
    twin: Callable[[Tensor], Tensor] | None = None
    """What counts in place of a true tensor in a fake step."""
    passes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    def watch(self) -> Tracker:
        """Run two steps, the second under a tracker."""
        work = self.work
        if work.model.training != self.train:
            work.model.train(self.train)
        with torch.set_grad_enabled(self.train):
            self.step(None)
            # A step starts with the gradients that the optimizer's zero_grad leaves, which are usually none.
            for tensor in (*_leaves(work.batch), *(() if work.optimizer else work.model.parameters())):
                tensor.grad = None
            tracker = Tracker(work.model, rounding=self.rounding, device=self.device, fakes=self.fakes)
            tracker.twin, tracker.weigh = self.twin, self.weigh
            with tracker, contextlib.ExitStack() as stack:
                tracker.own_model()
                if work.optimizer is not None:
                    tracker.own_states(work.optimizer)
                for module in work.extra:
                    tracker.own([*module.named_parameters(), *module.named_buffers()], "optimizer_states")
                for tensor in _leaves(work.batch):
                    tracker.see(tensor)
                    if tensor.requires_grad:
                        stack.callback(tracker.follow_gradient("", tensor))
                self.step(tracker)
        return tracker

    def step(self, tracker: Tracker | None) -> None:
        """One step as a training loop does it."""
        work = self.work
        phase = tracker.phase if tracker is not None else lambda name: contextlib.nullcontext()
        for part in work.parts(work.batch) if work.parts is not None else [work.batch]:
            with phase("forward"):
                loss = self._forward(part)
                if tracker is not None:
                    tracker.end_forward(loss)
            if loss is not None:
                with phase("backward"), _explained(work.model, f"{type(work.model).__name__} failed in backward"):
                    loss.backward()
                    del loss
        if self.train and (work.optimizer is not None or work.after is not None):
            failed = f"the optimizer's part of a step of {type(work.model).__name__} failed"
            with phase("optimizer"), self.values(), _explained(work.model, failed):
                if work.before_step is not None:
                    work.before_step(work.model)
                if work.optimizer is not None:
                    work.optimizer.step()
                    work.optimizer.zero_grad()
                if work.after is not None:
                    work.after(work.model)

    def _forward(self, part: Any) -> Tensor | None:
        failed = f"{type(self.work.model).__name__} failed when it was called with {describe(part)}"
        with _explained(self.work.model, failed, wrong_input=True):
            loss = self.work.forward(self.work.model, part)
        if not self.train:
            return None
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            lost = " that does not depend on any parameter" if isinstance(loss, Tensor) and loss.numel() == 1 else ""
            raise InputError(
                f"the loss must be one number that depends on the parameters; it is {what}{lost}. Give "
                "loss=a function of the model's output, or train=False."
            )
        return loss


def _on_fakes(
    work: Work, train: bool, kind: str, passes: Sequence[Any], rounding: int, weigh: bool
) -> tuple[_Run, Tracker]:
    mode = fake.mode_of(work.model) or fake.new_mode()
    with core.without_passes(work.model) as active:
        given = {id(o): o for o in (work.optimizer, *active.optimizers) if o is not None}
        copies = fake.Copies(mode)
        try:
            twin, optimizers = copies.of((work, tuple(given.values())), work.model, *work.extra)
        except MemoptError:
            raise
        except Exception as error:
            raise MemoptError(
                f"{type(work.model).__name__} cannot be copied onto fake tensors: {type(error).__name__}: {error}. "
                "Profile it on true tensors: real=True, or --real."
            ) from error
    corrected = corrections.Corrected(copies)
    run = _Run(twin, train, "cpu", rounding, weigh, values=corrected.answering, fakes=True, twin=corrected.twin)
    with mode, corrected, contextlib.ExitStack() as stack:
        stack.enter_context(libraries.corrected(_leaves(twin.batch)))
        notes = stack.enter_context(cuda.kernels()) if kind == "cuda" else ()
        kept = core.apply(twin.model, active.passes, optimizer=optimizers or None, missing="skip")
        added = core.apply(twin.model, list(passes), optimizer=optimizers or None)
        run.passes = tuple(map(str, (*kept.passes, *added.passes)))
        tracker = run.watch()
        run.assumptions = (*notes, *corrected.notes)
        return run, tracker


def _on_the_model(
    work: Work, train: bool, kind: str, passes: Sequence[Any], rounding: int, weigh: bool
) -> tuple[_Run, Tracker]:
    run = _Run(work, train, kind, rounding, weigh)
    with restored(work.model, work.optimizer, work.extra, list(_leaves(work.batch))):
        active = core.active_passes(work.model).passes
        with core.apply(work.model, list(passes), optimizer=work.optimizer) as handle:
            run.passes = tuple(map(str, (*active, *handle.passes)))
            return run, run.watch()


def _check_steps(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)  # not the instance's, which a scheduler may replace
    except TypeError:
        raise InputError(
            f"a step of {type(optimizer).__name__} calls a closure that runs the model again, as often as it likes, "
            "which a profile cannot foresee. Profile the model without an optimizer."
        ) from None


@contextlib.contextmanager
def _explained(model: nn.Module, failed: str, wrong_input: bool = False) -> Iterator[None]:
    """Turn what a step raises on fake tensors, or on inputs it cannot take, into an error that says what to do.

    ``failed`` begins the message. ``wrong_input``: on true tensors, too, what was given is probably at fault.
    """
    from torch._subclasses import fake_tensor

    values = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )
    try:
        yield
    except values as error:
        raise MemoptError(
            f"{type(model).__name__} cannot be profiled on fake tensors: {_line_of(error)} needs the values of a "
            f"tensor ({type(error).__name__}: {error}). Profile it on true tensors: real=True, or --real."
        ) from error
    except (MemoptError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "saved tensor hooks" in str(error):  # torch.func's transformations
            raise MemoptError(
                f"{type(model).__name__} cannot be profiled: {_line_of(error)} does what torch refuses while a "
                f"profile watches what autograd saves ({error}). This is a limit of the profiler, not of the inputs."
            ) from error
        on_fakes = fake.active()
        if not wrong_input and not on_fakes:
            raise
        more = " If the model runs with these inputs, profile true tensors: real=True, or --real." if on_fakes else ""
        raise (InputError if wrong_input else MemoptError)(
            f"{failed}: {type(error).__name__}: {error} ({_line_of(error)}).{more}"
        ) from error


def _line_of(error: BaseException) -> str:
    """The line of the model's code that an error comes from: the innermost that is neither torch's nor ours."""
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside)]
    if not frames:
        return "a line inside torch"
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}"


def _kind(device: str | torch.device) -> str:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: a profile speaks of 'cpu' or 'cuda'")
    return kind


def default_loss(output: Any, of: Callable[[Tensor], Tensor] = Tensor.mean) -> Tensor:
    """The output's own ``loss`` if it has one, else the mean over (or ``of``) each floating tensor in it, added up.

    Raises:
        InputError: there is no floating tensor in the output.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1:
        return own
    floating = [t for t in _leaves(output) if t.is_floating_point()]
    if not floating:
        raise InputError(
            f"there is no floating tensor in the output, a {type(output).__name__}: give loss=, or train=False"
        )
    total = of(floating[0])
    for tensor in floating[1:]:
        total = total + of(tensor)
    return total


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from any of the forms of ``inputs``.

    Raises:
        InputError: the model's forward does not take them.
    """
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        args, kwargs = inputs
    elif isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args, kwargs = tuple(inputs), {}
    else:
        args, kwargs = (inputs,), {}
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # traced and scripted modules
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward{signature} cannot be called like this: {error}") from None
    return args, kwargs


def describe(inputs: Any) -> str:
    """Inputs in a line: ``2x4x32x32 float32, timestep=2 int64``."""
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        inputs = {**dict(enumerate(inputs[0])), **inputs[1]}
    if isinstance(inputs, Tensor):
        return f"{'x'.join(map(str, inputs.shape)) or 'scalar'} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        parts = [(("" if isinstance(k, int) else f"{k}="), describe(v)) for k, v in inputs.items()]
        return ", ".join(f"{name}({text})" if ", " in text else f"{name}{text}" for name, text in parts)
    if isinstance(inputs, (tuple, list)):
        return ", ".join(map(describe, inputs))
    return str(inputs) if isinstance(inputs, (bool, int, float, str, type(None))) else type(inputs).__name__


def _leaves(value: Any) -> list[Tensor]:
    """All tensors in nested containers and dataclasses."""
    from torch.utils._pytree import tree_leaves

    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found.extend(_leaves(dict(leaf)))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(_leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)]))
    return found
