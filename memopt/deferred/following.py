"""Where chains of deferred values begin, and the two of torch's Python functions that would let one pass unseen."""

from __future__ import annotations

import contextlib
import importlib
import operator
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from memopt.deferred.standin import StandIn, apply, made, roots, tensors_in, work
from memopt.deferred.value import (
    Chain,
    Tell,
    saving_hooks,
)
from memopt.tensors import PLAIN, storage_of


class Following(TorchFunctionMode):
    """While active, chains of deferred values begin.

    Not below hooks on saved tensors that the code it watches has installed: a checkpoint of the model's own would run
    that code again without this mode, and find other tensors to save.
    """

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.chain = Chain(tell)
        self._hooks = saving_hooks()
        self._follows = not torch.compiler.is_dynamo_compiling() or _operators_in_order()

    @property
    def begins(self) -> bool:
        if not self._follows or work() or self._hooks != saving_hooks():
            return False
        # Transforms of torch.func want derivatives that the cheaper ways may not have.
        return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            self._settle([*args[:1], kwargs.get("out")])
        if any(isinstance(arg, StandIn) for arg in args):  # what func itself would do, but torch.compile cannot
            return apply(func, args, kwargs)
        return self.begin(func, args, kwargs)

    def begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call without deferred values gives: its result, or the first of a chain."""
        raise NotImplementedError

    def _settle(self, written: list[Any]) -> None:
        """Make what depends on memory that is about to be changed."""
        why = "a change in place"
        if torch.compiler.is_compiling():  # which does not tell what shares memory
            self.chain.settle(lambda value: True, why)
            return
        storages = {storage_of(tensor) for tensor in tree_leaves(written) if isinstance(tensor, Tensor)}
        if storages:
            self.chain.settle(lambda value: value.reads(storages), why)

    def outer(self, call: tuple[Any, ...], a: Tensor, b: Tensor) -> Any:
        """What a call gives that makes the outer product of each of a's rows with b's."""
        func, args, kwargs = call
        return func(*args, **kwargs)


_IN_PLACE = re.compile(
    r"(?!__).*[^_]_|__i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|[lr]shift)__|__setitem__"
)
WRITERS = {
    getattr(home, name): True
    for home in (torch, Tensor, F)
    for name in dir(home)
    if _IN_PLACE.fullmatch(name) and callable(getattr(home, name))
}
"""A mapping, because torch.compile knows these."""


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function may write to its first argument or to ``out``; some take ``inplace`` by position."""
    if func in WRITERS or "out" in kwargs or kwargs.get("inplace", False):
        return True
    return any([arg is True for arg in args[1:]])


def _operators_in_order() -> bool:
    """Have torch.compile call ``value @ tensor`` as such.

    It hands an operator to ``__torch_function__`` with the tensor first, and names the reversed operator for it; but it
    has no such name for matmul (torch 2.8 to 2.13), so a product would silently have its factors in the wrong order.

    Returns:
        Whether it can be had: torch keeps the names where this looks for them.
    """
    from torch._dynamo.variables import builtin, torch_function

    for home in (builtin, torch_function):
        if hasattr(home, "BUILTIN_TO_TENSOR_RFN_MAP") and hasattr(home, "populate_builtin_to_tensor_fn_map"):
            with unset_fake_temporarily():  # under which torch.compile asks
                home.populate_builtin_to_tensor_fn_map()
            for name in (operator.matmul, operator.imatmul):
                home.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(name, Tensor.__rmatmul__)
            return True
    return False


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it.
_operators_in_order._dynamo_marked_constant = True  # type: ignore[attr-defined]

_apis: Any = importlib.import_module("torch._functorch.apis")
_lock = threading.Lock()
_watching = 0


def watched() -> contextlib.AbstractContextManager[None]:
    """While active, ``torch.autograd.Function``s are applied to tensors, and vmap tells of outer products."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _watch()


@contextlib.contextmanager
def _watch() -> Iterator[None]:
    global _watching
    with _lock:
        _watching += 1
        if _watching == 1:
            torch.autograd.Function.apply = classmethod(_apply_function)  # type: ignore[assignment]
            _apis.vmap_impl = _vmap
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if _watching == 0:
                torch.autograd.Function.apply = _function_apply  # type: ignore[method-assign]
                _apis.vmap_impl = _vmap_impl


_function_apply: Any = vars(torch.autograd.Function)["apply"]
_vmap_impl = _apis.vmap_impl


def _apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    why = cls.__name__
    if why == "_NoopSaveInputs":  # of torch's checkpoint: it only keeps its arguments, of any kind
        return _function_apply.__get__(None, cls)(*args, **kwargs)
    return _function_apply.__get__(None, cls)(*tensors_in(args, why), **tensors_in(kwargs, why))


def _vmap(func: Any, in_dims: Any, out_dims: Any, randomness: str, chunk_size: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tensors_in(args, "vmap"), tensors_in(kwargs, "vmap")
    call = (_vmap_impl, (func, in_dims, out_dims, randomness, chunk_size, *args), kwargs)
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Following) and mode.begins]
    plain = all(type(arg) in PLAIN and arg.ndim == 2 for arg in args)
    if modes and plain and not kwargs and out_dims == 0 and in_dims in (0, (0,), (0, 0)):
        factors = _factors_of(func, args)
        if factors is not None:
            return modes[-1].outer(call, *factors)
    return _vmap_impl(*call[1], **kwargs)


class _Row:
    """A row of each matrix: knows that it can be multiplied with another, and nothing else."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def outer(self, other: _Row) -> tuple[Tensor, Tensor]:
        return self.rows, other.rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].outer(args[1])


def _factors_of(func: Any, matrices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """Which of the matrices' rows a function multiplies, if that is all it does: torch.outer, or a lambda around it."""
    if func not in (torch.outer, Tensor.outer):
        code = getattr(func, "__code__", None)
        if code is None or "outer" not in code.co_names or not {*code.co_names} <= {"torch", "Tensor", "outer"}:
            return None
    try:
        found = func(*map(_Row, matrices))
    except (AttributeError, TypeError):  # it does something with a row before
        return None
    return found if isinstance(found, tuple) and len(found) == 2 else None


def entered(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a model's forward: only tensors leave it, whatever its modules hand to one another."""
    roots().append(module)
    try:
        with watched():
            return made(inner(*args, **kwargs))
    finally:
        roots().pop()


def followed(mode: Following, module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a module's method in a mode; its result may be a deferred value if the model's forward is around it."""
    compiling = torch.compiler.is_compiling()
    if not compiling and _hooked(module):
        mode.chain.tell("calls not followed because of full backward hooks, which tensors alone set off")
        work().append("hooked")
        try:
            return inner(*args, **kwargs)
        finally:
            work().pop()
    with mode, watched():
        result = inner(*args, **kwargs)
    # A checkpoint's recomputation is a part of that forward, too.
    inside = roots() or (not compiling and torch._C._current_graph_task_id() != -1)
    return result if inside else tensors_in(result, "a module called by itself")


def _hooked(module: nn.Module) -> bool:
    return any(m._backward_hooks or m._backward_pre_hooks for m in module.modules())
