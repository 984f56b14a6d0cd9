"""Norms, activations, dropout, casts and copies keep what they began with, not their results (memopt.remat).

Where autograd saves the result of a cheap operation, backward makes it again from what is kept anyhow: a norm's input
gives what the activation, the dropout and the convolution behind it need; the parts of a concatenation, one of which is
a skip connection that the encoder keeps, give the whole; dropout keeps the state of its generator instead of a mask.

Which operations follow one another shows when the model runs, also in functions and in other libraries' blocks; nothing
is traced, and neither the model's modules nor its code run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from memopt.cheap import FAMILIES
from memopt.core import Edit
from memopt.recording import Recording, recording
from memopt.registry import Claim, Context, Pass
from memopt.saved import hooks_allowed, hooks_in_force, in_selective_checkpoint
from memopt.source import names_in
from memopt.units import parse_bytes

_NAMES = frozenset(" ".join(FAMILIES[family] for family in ("norms", "activations", "dropout")).split())
_HOMES = tuple(
    f"torch.nn.modules.{name}" for name in ("normalization", "batchnorm", "instancenorm", "activation", "dropout")
)


@dataclass(frozen=True, kw_only=True)
class LeanOps(Pass):
    """Results of norms, activations, dropout, casts and copies are not kept but made again, where that is smaller."""

    name = "lean_ops"
    stage = "rewrite"
    exact = True
    modes = frozenset({"train"})
    needs = "norms, activations or dropout: modules of torch's, or calls of them in the code of a module"

    min_bytes: int | str = "16KiB"
    """Smaller storages are kept as they are: making them again costs more than it gains."""

    def __post_init__(self) -> None:
        parse_bytes(self.min_bytes)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        types: set[Any] = {type(module) for module in model.modules()}
        found = any(cls.__module__ in _HOMES or names_in(cls) & _NAMES for cls in types)
        return [Claim("", "activations", "cheap results")] if found else []

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        least, counts = parse_bytes(self.min_bytes), edit.counts

        def around(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._is_tracing() or forward_ad._current_level >= 0:
                return inner(*args, **kwargs)
            if not torch.is_grad_enabled() or not hooks_allowed() or recording() is not None:
                return inner(*args, **kwargs)
            if in_selective_checkpoint():  # has made the cheap results once more, for a block at a time
                return inner(*args, **kwargs)
            with Recording(hooks_in_force(), module.parameters(), module.buffers(), least, counts).active():
                return inner(*args, **kwargs)

        # Also inside: a full checkpoint runs a block again with hooks of its own.
        for module in edit.model.modules():
            if module is edit.model or any(True for _ in module.children()):
                edit.wrap(module, "forward", around)
