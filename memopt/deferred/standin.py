"""Values that stand for tensors in a model's code, and give them to whoever needs more than a look."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_MARKING = re.compile(r"(?!__).*_|__i(?!nvert|nt|ndex|ter)\w+__|__(set|del)item__|register_\w*hook|retain_grad")
"""Functions after which a tensor is not what it was: those in place, and those that hang something on it."""


class StandIn:
    """Stands for a tensor.

    It has the attributes, methods and operators of a tensor, yet is none for ``isinstance``: torch's own C++ code asks
    that, and would take it for memory. It has ``shape``, ``dtype`` and ``device``.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    rules: dict[Any, tuple[Callable[..., Any], frozenset[str] | None]] = {}
    """What it makes of functions that it is given to, which may be NotImplemented, and the keywords each rule takes."""
    moves = False
    """Whether it stands for a tensor that exists, somewhere."""
    __array_priority__ = Tensor.__array_priority__

    @property
    def ruled(self) -> bool:
        """Whether rules may use it instead of the tensor."""
        return False

    def make(self, why: str) -> Tensor:
        """The tensor itself, because of an operation that knows no better."""
        raise NotImplementedError

    def mark(self, why: str) -> Tensor:
        """The tensor itself, which an operation changes in place or hangs something on."""
        raise NotImplementedError

    def consume(self) -> None:
        """Remember that a result was computed from it without its being made."""

    def stands_for(self, result: Any) -> bool:
        """Whether the result of an operation is the very tensor."""
        return False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def data(self) -> Tensor:
        return self.mark("data").data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.mark("data").data = value

    @property
    def mT(self) -> Any:
        return apply(Tensor.transpose, (self, -2, -1), {})

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)  # AttributeError as for a tensor
        if callable(method):
            return lambda *args, **kwargs: apply(method, (self, *args), kwargs)
        return getattr(self.make(name), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return apply(func, args, kwargs or {})


_OPERATORS = """
abs neg pos invert bool int float complex index iter reversed contains repr format array getitem setitem delitem
lt le eq ne ge gt add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv ifloordiv
mod rmod imod pow rpow ipow matmul rmatmul and rand iand or ror ior xor rxor ixor lshift rlshift ilshift
rshift rrshift irshift reduce_ex
"""
_METHODS = {"mul": Tensor.mul, "rmul": Tensor.mul, "truediv": Tensor.div, "matmul": Tensor.matmul}
"""Operators by the names under which rules know them."""


def _operator(name: str) -> Callable[..., Any]:
    method = _METHODS.get(name) or getattr(Tensor, f"__{name}__")
    if name == "rmatmul":
        return lambda self, other: apply(Tensor.matmul, (other, self), {})
    return lambda self, *args, **kwargs: apply(method, (self, *args), kwargs)


for _name in _OPERATORS.split():  # Python looks for these in the class, not by __getattr__
    setattr(StandIn, f"__{_name}__", _operator(_name))


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch with stand-ins among its arguments: by a rule, else with tensors."""
    if func is Tensor.__rmatmul__:
        func, args = Tensor.matmul, args[::-1]
    values = list(among(args))
    if all([value.ruled for value in values]):
        for value in values:
            rule, names = type(value).rules.get(func, (None, None))
            if rule is not None and (names is None or kwargs.keys() <= names):
                working = work()
                working.append((type(value), "followed"))
                try:
                    result = rule(func, *args, **kwargs)
                finally:
                    working.pop()
                if result is not NotImplemented:
                    if isinstance(result, Tensor):
                        for used in values:
                            used.consume()
                    return result
    name = getattr(func, "__name__", str(func))
    if args and isinstance(args[0], StandIn) and _MARKING.fullmatch(name):
        args[0].mark(name)
    result = func(*tensors_in(args, name), **tensors_in(kwargs, name))
    for value in values:
        if value.stands_for(result):
            return value
    return result


class _Thread(threading.local):
    def __init__(self) -> None:
        self.work: list[Any] = []
        self.roots: list[Any] = []


_thread = _Thread()
_compiled_work: list[Any] = []
_compiled_roots: list[Any] = []


def work() -> list[Any]:
    """What this thread is making or following by a rule; while it is, no chain begins."""
    return _compiled_work if torch.compiler.is_compiling() else _thread.work


def roots() -> list[Any]:
    """The models whose forward this thread is in, that make tensors of all that leaves them."""
    return _compiled_roots if torch.compiler.is_compiling() else _thread.roots


def among(values: Any) -> Iterator[StandIn]:
    """The stand-ins in nested tuples and lists."""
    return (value for value in leaves(values) if isinstance(value, StandIn))


def leaves(values: Any) -> Iterator[Any]:
    """The tensors and stand-ins in nested tuples and lists."""
    for value in values:
        if isinstance(value, (Tensor, StandIn)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from leaves(value)


def tensors_in(value: Any, why: str) -> Any:
    """The same with tensors for stand-ins; the very same object if there are none."""
    if isinstance(value, StandIn):
        return value.make(why)
    if value is None or isinstance(value, (Tensor, str, int, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, (list, tuple)):
        items = [tensors_in(item, why) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        found = {key: tensors_in(item, why) for key, item in value.items()}
        if all(found[key] is item for key, item in value.items()):
            return value
        if type(value) is dict:
            return found
        twin: Any = copy.copy(value)  # such as the outputs of transformers, whose items are attributes too
        for key, item in found.items():
            twin[key] = item
        return twin
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: tensors_in(item, why) for name, item in old.items()}
        if all(new[name] is old[name] for name in old):
            return value
        twin = copy.copy(value)
        for name, item in new.items():
            object.__setattr__(twin, name, item)  # also where it is frozen
        return twin
    return value


def made(value: Any) -> Any:
    """Tensors for all stand-ins in nested tuples, lists, mappings and dataclasses: for what leaves a model."""
    return tensors_in(value, "the result of the model")
