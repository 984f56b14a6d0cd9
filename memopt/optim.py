"""The steps of a torch optimizer, a piece of its parameters at a time, and what stands for its states in between.

The optimizers of torch step each parameter by itself. So a step of all of them is a step of one piece after another,
bit by bit, and it is the optimizer's own: the piece is all that its ``param_groups`` show meanwhile. What its options
mean, today and in later versions, is therefore not repeated here. Two things become possible by it:

- States can be in another form, or elsewhere, while their piece is not stepped (a :class:`Shelf`).
- A parameter can be stepped as soon as its gradient is there (:meth:`Steps.arrived`).

Both meet in one object, :class:`Steps`, which an optimizer has while a pass needs it. To others the optimizer is what
it was: ``state_dict`` gives ordinary tensors, those off the shelf on the CPU, and takes them; hooks of steps run once
for each ``step()``; learning-rate schedulers, made before or after, count it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from memopt.core import Edit
from memopt.errors import InputError, PassConflict
from memopt.saved import note_step
from memopt.tensors import differs, laid

Piece = list[tuple[dict[str, Any], list[Tensor]]]
"""Some parameters, by the group they are in."""

_STEPS = "_memopt_steps"
_COUPLED = ("lbfgs",)


def check(optimizer: Optimizer, name: str) -> None:
    """Raise an InputError for an optimizer that may not step each parameter by itself."""
    module = _raw_step(type(optimizer)).__module__
    if module.rpartition(".")[0] != "torch.optim" or kind_of(optimizer) in _COUPLED:
        raise InputError(
            f"{name}: a step of {type(optimizer).__name__} ({module}) may look at several parameters, so "
            f"it cannot be taken apart. Use an optimizer of torch.optim other than LBFGS, or leave {name} out."
        )


def kind_of(optimizer: Optimizer) -> str:
    """The module of torch.optim that the optimizer's step is from."""
    return _raw_step(type(optimizer)).__module__.rpartition(".")[2]


def align(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Lay the states and gradients of images' weights out as these are: fused kernels look at flat memory."""
    for parameter in parameters:
        if parameter.dim() not in (4, 5):
            continue
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and differs(state, parameter):
                if not state.is_floating_point() and not state.is_complex():
                    raise InputError(
                        f"channels_last: {key} of {type(optimizer).__name__} is quantized in blocks of memory, which "
                        "another layout of its weight would mix up. Take channels_last on or off before the "
                        "optimizer's first step."
                    )
                state.data = laid(state, parameter.stride())
        if parameter.grad is not None and differs(parameter.grad, parameter):
            grad, parameter.grad = parameter.grad, None
            parameter.grad = laid(grad, parameter.stride())


_dead: list[RemovableHandle] = []


def before_steps(owner: Any, hook: Callable[[Any, Optimizer], None]) -> RemovableHandle:
    """Have a function called with an object and the optimizer before each step of any, for as long as the object lives.

    The object may die while torch goes through the hooks, which must not change then: the hooks of those that died are
    taken off when the next is put on.
    """
    take_off_dead()
    found = weakref.ref(owner)

    def begins(optimizer: Optimizer, *_: Any) -> None:
        if (owner := found()) is not None:
            hook(owner, optimizer)

    handle = register_optimizer_step_pre_hook(begins)
    weakref.finalize(owner, _dead.append, handle).atexit = False
    return handle


def take_off_dead() -> None:
    """Take off the hooks of those that died; not while an optimizer steps."""
    while _dead:
        _dead.pop().remove()


class Shelf(ABC):
    """Where states are while nobody steps with them."""

    at_once: int
    """Bytes of parameters in a piece, whose states are off the shelf at a time."""

    @abstractmethod
    def put(self, name: str, state: Tensor, parameter: Tensor) -> Any:
        """What stands for a state from now on; the state itself if it stays."""

    @abstractmethod
    def get(self, kept: Any) -> Tensor | None:
        """The state that something stands for, on its parameter's device; None if it stands for none."""

    def fetch(self, kept: Any) -> None:  # noqa: B027
        """For those that can: begin with what ``get`` will have to do."""

    def close(self) -> None:  # noqa: B027
        """For those that hold something: nothing is on the shelf any more."""


def steps_of(edit: Edit, optimizer: Optimizer) -> Steps:
    """The optimizer's steps, taken apart from now on until the edit is undone."""
    steps: Steps | None = vars(optimizer).get(_STEPS)
    if steps is not None:
        owner = steps.owner()
        if owner is None:
            raise PassConflict(
                f"this {type(optimizer).__name__} has passes through a model that is no longer there. Make a new "
                "optimizer and load this one's state_dict() into it."
            )
        if owner is not edit.model:
            raise PassConflict(
                f"this {type(optimizer).__name__} has passes through another model. Apply all that concern an "
                "optimizer to one of its models."
            )
        return steps
    steps = Steps(_raw_step(type(optimizer)), edit.model)
    scheduled = _is_scheduled(optimizer)
    if scheduled:
        edit.hook(_Aside, optimizer, "step")
    edit.wrap(optimizer, "step", _around_step)
    edit.wrap(optimizer, "state_dict", _around_state_dict)
    edit.wrap(optimizer, "load_state_dict", _around_load)
    edit.wrap(optimizer, "__getstate__", _around_getstate)
    edit.set(optimizer, _STEPS, steps)
    if scheduled:
        edit.set(optimizer, "step", _scheduled(weakref.ref(optimizer)))
    return steps


class Steps:
    """Steps an optimizer piece by piece. It is found in the optimizer, and knows of it only what it is given."""

    def __init__(self, raw: Callable[..., Any], owner: Any) -> None:
        self.raw, self.owner = raw, weakref.ref(owner)
        self.shelf: Shelf | None = None
        self.lock = threading.RLock()
        """Held while a piece is stepped: autograd has a thread for each device."""
        self._early: dict[int, _Backward] = {}
        """Parameters that were stepped since the last ``step()``, by the backward that they were stepped in."""
        self._backwards: weakref.WeakValueDictionary[int, _Backward] = weakref.WeakValueDictionary()

    def whole(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step what has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self.lock:
            self._early.clear()
            pieces = list(self._pieces(optimizer))
            for i, piece in enumerate(pieces):
                if self.shelf is not None:
                    for _, kept in _kept(optimizer, _parameters(pieces[i + 1 : i + 2])):
                        self.shelf.fetch(kept)
                self._step(optimizer, piece)
        return loss

    def arrived(self, optimizer: Optimizer, place: tuple[int, int], parameter: Tensor, name: str) -> None:
        """Step a parameter whose gradient autograd has just finished, and drop the gradient.

        Args:
            place: the number of its group, and its own there, unless groups were changed meanwhile. One that has been
                taken out of the optimizer keeps its gradient.

        Raises:
            InputError: it is the second gradient since the last ``step()``.
        """
        with self.lock:
            group = _group_of(optimizer, place, parameter)
            if group is None:
                return
            before = self._early.get(id(parameter))
            if before is not None and not before.failed:
                raise InputError(
                    f"optimizer_in_backward: {name} was stepped already when another gradient came before "
                    "optimizer.step(). The pass cannot add up gradients over several backwards (gradient accumulation, "
                    "several losses, reentrant checkpoints of shared parameters), and a step() that is skipped or "
                    "fails takes no step back: call optimizer.step() after each backward, or leave the pass out."
                )
            self._early[id(parameter)] = self._backward()
            self._step(optimizer, [(group, [parameter])])
            parameter.grad = None
            note_step(parameter)

    def _backward(self) -> _Backward:
        """The backward that runs."""
        number = torch._C._current_graph_task_id()
        found = self._backwards.get(number)
        if found is None:
            found = self._backwards[number] = _Backward()
        return found

    def _pieces(self, optimizer: Optimizer) -> Iterator[Piece]:
        piece: Piece = []
        size = 0
        for group in optimizer.param_groups:
            piece.append((group, []))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.shelf is not None and size and size + parameter.nbytes > self.shelf.at_once:
                    yield piece
                    piece, size = [(group, [])], 0
                piece[-1][1].append(parameter)
                size += parameter.nbytes
        yield piece  # with nothing to step, too: the optimizer may want to know of it

    def _step(self, optimizer: Optimizer, piece: Piece) -> None:
        parameters = list(_parameters([piece]))
        with _only(optimizer, piece):
            self.take(optimizer, parameters)
            try:
                align(optimizer, parameters)  # no hook sees the states of a shelf, nor a step in backward
                self.raw(optimizer)
            finally:
                increment_version(parameters)  # fused kernels do not tell autograd
                self.put(optimizer, parameters)

    def put(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Put the states of parameters on the shelf."""
        if self.shelf is None:
            return
        with torch.no_grad():
            for parameter in parameters:
                state = optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        state[name] = self.shelf.put(name, value, parameter)

    def take(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Take the states of parameters from the shelf."""
        if self.shelf is not None:
            with torch.no_grad():
                for (state, name), kept in _kept(optimizer, parameters):
                    if (value := self.shelf.get(kept)) is not None:
                        state[name] = value

    @contextlib.contextmanager
    def shown(self, optimizer: Optimizer, device: str | None = None) -> Iterator[None]:
        """Inside, the optimizer's states are ordinary tensors, those off the shelf on a device of choice."""
        before = optimizer.state
        try:
            with torch.no_grad():
                optimizer.state = defaultdict(dict, before)
                for parameter in _with_states(optimizer):
                    state = before[parameter].items()
                    optimizer.state[parameter] = {name: self._shown(value, device) for name, value in state}
            yield
        finally:
            optimizer.state = before

    def _shown(self, value: Any, device: str | None) -> Any:
        state = None if self.shelf is None or isinstance(value, Tensor) else self.shelf.get(value)
        return value if state is None else state if device is None else state.to(device)


class Shelved:
    """All states of an optimizer are on a shelf until ``remove``; for ``Edit.hook``."""

    def __init__(self, optimizer: Optimizer, steps: Steps, shelf: Shelf, name: str) -> None:
        if steps.shelf is not None:
            raise PassConflict(f"{name}: another pass has the states of this {type(optimizer).__name__} already")
        self._optimizer, self._steps = optimizer, steps
        steps.shelf = shelf
        try:
            steps.put(optimizer, _with_states(optimizer))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take them from it."""
        shelf = self._steps.shelf
        assert shelf is not None
        self._steps.take(self._optimizer, _with_states(self._optimizer))
        self._steps.shelf = None
        shelf.close()


class _Backward:
    """One run of autograd's engine, which tells when it ends well and forgets it if it does not."""

    def __init__(self) -> None:
        self._done: list[bool] = []

        def ended(done: list[bool] = self._done) -> None:
            done.append(True)

        self._held = weakref.ref(ended)
        torch.autograd.Variable._execution_engine.queue_callback(ended)

    @property
    def failed(self) -> bool:
        """Whether an exception ended it."""
        return not self._done and self._held() is None


class _Aside:
    """An attribute of an instance that is not there until ``remove``."""

    def __init__(self, target: Any, name: str) -> None:
        self._target, self._name, self._value = target, name, vars(target).pop(name)

    def remove(self) -> None:
        vars(self._target)[self._name] = self._value


def _around_step(optimizer: Optimizer, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    steps: Steps | None = vars(optimizer).get(_STEPS)
    if steps is None:  # of a copy, or called by a scheduler that was made before the passes were undone
        return inner(*args, **kwargs)
    return Optimizer.profile_hook_step(steps.whole)(optimizer, *args, **kwargs)


def _around_state_dict(optimizer: Optimizer, inner: Callable[[], Any], /) -> Any:
    steps: Steps | None = vars(optimizer).get(_STEPS)
    if steps is None:
        return inner()
    with steps.shown(optimizer, "cpu"):
        return inner()


def _around_load(optimizer: Optimizer, inner: Callable[..., Any], /, state_dict: Mapping[str, Any]) -> None:
    inner(state_dict)
    steps: Steps | None = vars(optimizer).get(_STEPS)
    if steps is not None:
        steps.put(optimizer, _with_states(optimizer))


def _around_getstate(optimizer: Optimizer, inner: Callable[[], Any], /) -> Any:
    """A copy of the optimizer has ordinary states."""
    steps: Steps | None = vars(optimizer).get(_STEPS)
    if steps is None:
        return inner()
    with steps.shown(optimizer):
        return inner()


def _is_scheduled(optimizer: Optimizer) -> bool:
    """Whether the optimizer has a step of its own, and it is the class's with nothing around but a scheduler's."""
    step = vars(optimizer).get("step")
    if not hasattr(step, "_wrapped_by_lr_sched"):
        return False
    while step is not type(optimizer).step:
        # It may be around that of a pass, which was undone. What others wrap has the same marks, and other globals.
        if getattr(step, "__globals__", {}).get("__name__") not in ("torch.optim.lr_scheduler", "memopt.core"):
            return False  # Edit.wrap will say so
        step = step.__wrapped__  # type: ignore[union-attr]
    return True


def _scheduled(optimizer: weakref.ref[Optimizer]) -> Callable[..., Any]:
    """A step that tells learning-rate schedulers of itself, as they make it."""

    def step(*args: Any, **kwargs: Any) -> Any:
        target: Any = optimizer()
        target._opt_called = True
        return type(target).step(target, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step


def _raw_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """The step without the hooks that torch puts around it."""
    step: Any = kind.step
    raw: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step
    return raw


def _group_of(optimizer: Optimizer, place: tuple[int, int], parameter: Tensor) -> dict[str, Any] | None:
    """The group that a parameter is in; loading a state makes new ones."""
    number, i = place
    groups: list[dict[str, Any]] = optimizer.param_groups
    if number < len(groups) and i < len(groups[number]["params"]) and groups[number]["params"][i] is parameter:
        return groups[number]
    return next((group for group in groups if any(p is parameter for p in group["params"])), None)


def _parameters(pieces: Sequence[Piece]) -> Iterator[Tensor]:
    return (parameter for piece in pieces for _, parameters in piece for parameter in parameters)


def _with_states(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for parameter in optimizer.state if isinstance(parameter, Tensor)]


def _kept(optimizer: Optimizer, parameters: Any) -> list[tuple[tuple[dict[str, Any], str], Any]]:
    """What may stand for states: the state and the name it has there, and itself."""
    found = []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        found += [((state, name), value) for name, value in state.items() if not isinstance(value, Tensor)]
    return found


@contextlib.contextmanager
def _only(optimizer: Optimizer, piece: Piece) -> Iterator[None]:
    """Inside, the optimizer has only these parameters, in the groups that it has them in."""
    groups = optimizer.param_groups
    before = [group["params"] for group, _ in piece]
    optimizer.param_groups = [group for group, _ in piece]
    for group, parameters in piece:
        group["params"] = parameters
    try:
        yield
    finally:
        for (group, _), parameters in zip(piece, before, strict=True):
            group["params"] = parameters
        optimizer.param_groups = groups
