"""Drop gradients instead of filling them with zeros, whoever calls ``zero_grad``.

Since torch 2.0 ``optimizer.zero_grad()`` drops gradients by default, and a loop that relies on it has nothing to gain
here. Older code and some libraries still pass ``set_to_none=False``; then one gradient per parameter stays allocated
through the whole forward pass, where the activations have their peak. This pass overrules them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from memopt.core import Edit
from memopt.registry import Claim, Context, Pass


@dataclass(frozen=True, kw_only=True)
class SetToNone(Pass):
    """Every ``zero_grad`` of the optimizers frees the gradients: one byte saved per gradient byte during forward."""

    name: ClassVar[str] = "set_to_none"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = "an optimizer: memopt.apply(..., optimizer=optimizer)"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [Claim(f"{i}.zero_grad", "optimizer") for i in range(len(context.optimizers))]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        counts = edit.counts

        def zero_grad(optimizer: torch.optim.Optimizer, inner: Callable[..., Any], set_to_none: bool = True) -> None:
            counts["calls that wanted zeros"] += not set_to_none
            inner(set_to_none=True)

        for optimizer in edit.optimizers:
            edit.wrap(optimizer, "zero_grad", zero_grad)
