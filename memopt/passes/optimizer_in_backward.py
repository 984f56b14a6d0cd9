"""Each parameter is stepped as soon as backward has its gradient, which goes at once.

Without it, all gradients are there at the end of backward, four bytes a parameter. With it, one is there at a time: a
hook on each parameter, which autograd calls when the gradient is complete, steps this parameter alone
(`memopt/optim.py`) and drops the gradient. The loop's ``optimizer.step()`` is left with what has a gradient still, and
tells schedulers of the step as ever.

A step in backward sees one gradient and cannot wait for others. What needs them all cannot work, and is refused where
it can be seen: a second backward before ``optimizer.step()`` (gradient accumulation, several losses), the scaler that
fp16 needs, several processes that average their gradients, clipping by the norm of all in memopt's own loop. A backward
that was ended by an exception has stepped a part of the parameters; the next one goes on from there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memopt.core import Edit
from memopt.errors import InputError
from memopt.optim import Steps, check, steps_of
from memopt.registry import Claim, Context, Pass


@dataclass(frozen=True, kw_only=True)
class OptimizerInBackward(Pass):
    """Steps each parameter as soon as its gradient is there and drops this: never are all gradients there at once."""

    name: ClassVar[str] = "optimizer_in_backward"
    stage: ClassVar = "wrap"  # after those that change what a step is
    exact: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = "an optimizer of parameters that require gradients: memopt.apply(..., optimizer=optimizer)"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        found = []
        for i, optimizer in enumerate(context.optimizers):
            check(optimizer, self.name)
            if any(p.requires_grad and p.is_leaf for group in optimizer.param_groups for p in group["params"]):
                found.append(Claim(f"{i}.step", "optimizer"))
        if found:
            _check_alone()
            found.append(Claim("step", "loop", "gradients"))  # the fp16 scaler needs them all
        return found

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        names = {id(p): name for name, p in edit.model.named_parameters()}
        count = 0
        for claim in claims[:-1]:
            optimizer = edit.optimizers[int(claim.path.partition(".")[0])]
            steps = steps_of(edit, optimizer)
            for index, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    if parameter.requires_grad and parameter.is_leaf:
                        name = names.get(id(parameter), "a parameter that is not the model's")
                        edit.hook(parameter.register_post_accumulate_grad_hook, _hook(optimizer, steps, index, name))
                        count += 1
        edit.note(f"{count} parameters are stepped in backward")


def _hook(optimizer: torch.optim.Optimizer, steps: Steps, group: int, name: str) -> Callable[[Tensor], None]:
    owner = weakref.ref(optimizer)

    def arrived(parameter: Tensor) -> None:
        found = owner()
        if found is not None and parameter.grad is not None:
            _check_alone()
            steps.arrived(found, group, parameter, name)

    return arrived


def _check_alone() -> None:
    distributed: Any = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InputError(
            f"optimizer_in_backward: {distributed.get_world_size()} processes train together, and a parameter would be "
            "stepped before they have averaged its gradient. Train in one process, or leave the pass out."
        )
