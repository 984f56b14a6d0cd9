"""What all deferred values have in common."""

from __future__ import annotations

import contextlib
import inspect
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from memopt.deferred.standin import StandIn, among, leaves, tensors_in, work
from memopt.errors import MemoptError
from memopt.tensors import storage_of, version_of

Tell = Callable[[str], None]
_EQUATION = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)")
HOOKING = re.compile(r"register_\w*hook|retain_grad")
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(_CASTS.values())
MATMUL = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
CASTS = ("to", "type", "type_as", *_CASTS)


class Deferred(StandIn):
    """Stands for the result of ``func(*args, **kwargs)``, which is not computed yet.

    Args:
        shape, like: the shape, and a tensor of the type and on the device, of what it stands for.
        call: the function and its arguments, among which may be other deferred values.
        chain: what it began with, or that of the value it was made of.
    """

    noun = ""
    """What it is to a reader; empty if making it after all is not worth a word."""

    def __init__(self, shape: Sequence[int], like: Tensor, call: tuple[Any, ...], chain: Chain) -> None:
        self.shape = torch.Size(shape)
        self.dtype, self.device = like.dtype, like.device
        self.call, self.chain = call, chain
        self.made: Tensor | None = None
        self.marked, self.consumed = False, False
        self._version_made = 0
        self._modes, self._hooks = _modes(like.device), saving_hooks()
        self._versions = [] if torch.compiler.is_compiling() else [(t, version_of(t)) for t in self._tensors()]
        chain.add(self)

    def _tensors(self) -> list[Tensor]:
        """The tensors that the call was given."""
        return [value for value in leaves(self.call) if isinstance(value, Tensor)]

    def _origins(self) -> list[Deferred]:
        """The deferred values that the call was given."""
        return [value for value in among(self.call) if isinstance(value, Deferred)]

    def make(self, why: str) -> Tensor:
        """The tensor itself, because of an operation that knows no better."""
        if self.made is None:
            working = work()
            if self.noun and (type(self), "made") not in working:
                self.chain.tell(f"made {self.noun} for {why}")
            working.append((type(self), "made"))
            try:
                self.made = self._as_called(why)
            finally:
                working.pop()
            if not torch.compiler.is_compiling():
                self._version_made = version_of(self.made)
        return self.made

    def _as_called(self, why: str) -> Tensor:
        """What the call gives, in the modes in which it was called: a later ``no_grad`` must not cut its gradient."""
        func, args, kwargs = self.call
        if not self._fresh:
            raise MemoptError(
                f"{why} needs {self.noun or 'a product'} whose origin was changed in place since: leave out the pass "
                "that defers it"
            )
        if self._modes == _modes(self.device) and self._hooks == saving_hooks():
            result: Tensor = func(*tensors_in(args, why), **tensors_in(kwargs, why))
            return result
        grad, autocast, dtype = self._modes
        # Made once for all: what a checkpoint's recomputation will not make again, it must not see made.
        unseen = self._hooks != saving_hooks()
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(self.device.type, dtype=dtype, enabled=autocast) if autocast else _plain(self.device),
            saved_tensors_hooks(_same, _same) if unseen else contextlib.nullcontext(),
        ):
            result = func(*tensors_in(args, why), **tensors_in(kwargs, why))
            return result

    @property
    def changed(self) -> bool:
        """Whether the tensor was made and may since be another, or carry a hook."""
        if self.made is None or self.marked or torch.compiler.is_compiling():
            return self.made is not None
        return self._version_made < 0 or self._rewritten

    @property
    def _fresh(self) -> bool:
        """Whether nothing that the call was given was changed in place since."""
        if any([version_of(tensor) != version for tensor, version in self._versions]):
            return False
        return not any([value._rewritten or not value._fresh for value in self._origins()])

    @property
    def _rewritten(self) -> bool:
        """Whether the tensor was made and is known to have been written to since."""
        if self.made is None or torch.compiler.is_compiling():
            return False
        return version_of(self.made) != self._version_made

    @property
    def ruled(self) -> bool:
        """Whether rules may use it instead of the tensor."""
        grad, *autocast = self._modes
        grad_now, *autocast_now = _modes(self.device)
        # Not if it was computed without a gradient or in another precision than what would now be made of it.
        return not self.changed and self._fresh and autocast == autocast_now and (grad or not grad_now)

    def mark(self, why: str) -> Tensor:
        """The tensor itself, which is used from now on, also by values that began with this one."""
        self.chain.settle(lambda value: value.depends_on(self), why)
        if self.consumed and self.requires_grad and HOOKING.fullmatch(why):
            raise MemoptError(
                f"{why} comes too late for {self.noun or 'a product'} that was used without being made: leave out the "
                "pass that defers it"
            )
        self.marked = True
        return self.make(why)

    def depends_on(self, other: Deferred) -> bool:
        """Whether it began with another value."""
        return any([value is other or value.depends_on(other) for value in self._origins()])

    def reads(self, storages: set[int]) -> bool:
        """Whether memory at one of these addresses is what its call was given."""
        made = [value.made for value in self._origins() if value.made is not None]
        return any([storage_of(tensor) in storages for tensor in [*self._tensors(), *made]]) or any(
            [value.reads(storages) for value in self._origins()]
        )

    def consume(self) -> None:
        """Remember that a result was computed from it without its being made."""
        self.consumed = True
        for value in self._origins():
            value.consume()

    @property
    def requires_grad(self) -> bool:
        return self._modes[0] and any(value.requires_grad for value in leaves(self.call))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.mark("requires_grad").requires_grad = value


class Chain:
    """The values that began while a mode was active once, and who hears what becomes of them."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._values: list[Any] = []

    def add(self, value: Deferred) -> None:
        self._values.append(value if torch.compiler.is_compiling() else weakref.ref(value))

    def settle(self, concerned: Callable[[Deferred], bool], why: str) -> None:
        """Make values, in order, before something changes on which they depend: from then on they are tensors."""
        for entry in list(self._values):
            value = entry if isinstance(entry, Deferred) else entry()
            if value is not None and not value.marked and concerned(value):
                value.make(why)
                value.marked = True


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _plain(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without autocast, where there is one."""
    if _modes(device)[1]:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _modes(device: torch.device) -> tuple[bool, bool, torch.dtype | None]:
    """Whether gradients are recorded, and the state of autocast."""
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    autocast = known and torch.is_autocast_enabled(device.type)
    return torch.is_grad_enabled(), autocast, torch.get_autocast_dtype(device.type) if autocast else None


def in_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device, which may not know of it."""
    return _modes(device)[1]


def saving_hooks() -> Any:
    """The innermost hooks on tensors that are saved for backward."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


def autocast_dtype(like: Tensor) -> torch.dtype:
    """The type that a product of matrices like this has."""
    _, autocast, dtype = _modes(like.device)
    return like.dtype if not autocast or dtype is None or like.dtype == torch.float64 else dtype


def counting(counts: Counter[str]) -> Tell:
    """Counts what it is told, except while torch.compile looks."""

    def tell(text: str) -> None:
        if not torch.compiler.is_compiling():
            counts[text] += 1

    return tell


def rule(cls: type[Deferred], *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule under torch's functions and methods of these names."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        cls.rules = dict(cls.rules)
        parameters = inspect.signature(rule).parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
        keywords = None if any_keyword else frozenset(named)
        for name in names:
            for home in (torch, Tensor, F):
                if hasattr(home, name):
                    cls.rules[getattr(home, name)] = rule, keywords
        return rule

    return register


def is_number(value: Any) -> bool:
    """A Python number that a tensor can be scaled with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse(args: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """The three parts of an einsum of two operands without repeated letters in one of them."""
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    equation = args[0].replace(" ", "")
    if "Z" not in equation:
        equation = equation.replace("...", "Z")  # one dimension, or the operands have too many
    match = _EQUATION.fullmatch(equation)
    if match is None:
        return None
    left, right, out = match[1], match[2], match[3]
    if len(left) != args[1].ndim or len(right) != args[2].ndim:
        return None
    repeats = any([len(set(part)) < len(part) for part in (left, right, out)])
    return None if repeats else (left, right, out)


def parse_from(cls: type[Deferred], args: tuple[Any, ...]) -> tuple[str, str, str, Any, Any] | None:
    """An einsum of two, seen from the operand of a class: its letters, the other's, the result's; both operands."""
    parsed = parse(args)
    if parsed is None:
        return None
    left, right, out = parsed
    return (left, right, out, args[1], args[2]) if isinstance(args[1], cls) else (right, left, out, args[2], args[1])


def order_of(func: Any, ndim: int, dims: tuple[Any, ...]) -> list[int]:
    """The order of dimensions that permute or transpose makes."""
    if func.__name__ == "permute":
        given = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        return [dim % ndim for dim in given]
    order = list(range(ndim))
    i, j = (dim % ndim for dim in dims)
    order[i], order[j] = order[j], order[i]
    return order


def cast_of(func: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The floating type that a call of one of ``CASTS`` on x gives, or None if it does more than that."""
    dtype: torch.dtype = _CASTS.get(func.__name__, x.dtype)
    if func.__name__ == "type" and not args and not kwargs:  # asks for a name
        return None
    for given in (*args, *kwargs.values()):
        device = x.device
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (Tensor, Deferred)):
            dtype, device = given.dtype, given.device
        elif func.__name__ == "to" and isinstance(given, (str, torch.device)):
            device = torch.device(given)
        elif given is not None and not isinstance(given, bool):
            return None
        if device.type != x.device.type or device.index not in (None, x.device.index):
            return None
    return dtype if dtype in _FLOATS else None
