"""Checkpointing that models bring along: finding it, and running their forward without it.

Two kinds are common. A flag on a module (``gradient_checkpointing`` in diffusers and transformers, ``use_checkpoint``
in guided-diffusion and its heirs); and a module-level function ``checkpoint(func, inputs, params, flag)``, called in
``forward``, which restores neither random nor autocast state in its recomputation and cannot run backward twice.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

FLAGS = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "use_gradient_checkpointing")
SIGNATURE = ("func", "inputs", "params", "flag")

CheckpointFunction = Callable[[Callable[..., Any], Sequence[Any], Any, bool], Any]


def flags(module: nn.Module) -> list[str]:
    """The flags that are on in this module itself."""
    return [name for name in FLAGS if vars(module).get(name) is True]


def rewrite(forward: Any, replace: Callable[[CheckpointFunction], CheckpointFunction]) -> Callable[..., Any] | None:
    """``forward`` with each legacy checkpoint function among its globals replaced, or None if it calls none.

    The replacement holds for this copy of the function alone: other models of the same class are not touched.
    """
    if not isinstance(forward, types.FunctionType):
        return None
    found = {
        name: value
        for name in forward.__code__.co_names
        if isinstance(value := forward.__globals__.get(name), types.FunctionType)
        and tuple(inspect.signature(value).parameters) == SIGNATURE
    }
    if not found:
        return None
    scope = {**forward.__globals__, **{name: replace(value) for name, value in found.items()}}
    code, name, defaults, closure = forward.__code__, forward.__name__, forward.__defaults__, forward.__closure__
    copy = types.FunctionType(code, scope, name, defaults, closure)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def instead(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For ``Edit.wrap``: run ``forward`` in place of the method as it was."""
    return lambda module, inner, /, *args, **kwargs: forward(module, *args, **kwargs)
