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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memopt.core import Edit
from memopt.errors import InputError
from memopt.optim import Steps, check, steps_of
from memopt.registry import Claim, Context, Pass

_OTHER = "a parameter that is not the model's"


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
        names = _names(model)
        seen: set[int] = set()
        for i, optimizer in enumerate(context.optimizers):
            check(optimizer, self.name)
            stepped = [p for _, p in _places(optimizer)]
            for parameter in stepped:
                if id(parameter) in seen:
                    raise InputError(
                        f"{self.name}: {names.get(id(parameter), _OTHER)} is in two of the optimizers. The first would "
                        "drop its gradient before the second steps. Give it to one of them, or leave the pass out."
                    )
            seen.update(id(p) for p in stepped)
            if stepped:
                found.append(Claim(f"{i}.step", "optimizer"))
        if found:
            _check_alone()
            found.append(Claim("step", "loop", "gradients"))  # the fp16 scaler needs them all
        return found

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        names = _names(edit.model)
        count = 0
        for claim in claims[:-1]:
            optimizer = edit.optimizers[int(claim.path.partition(".")[0])]
            steps = steps_of(edit, optimizer)
            for place, parameter in _places(optimizer):
                name = names.get(id(parameter), _OTHER)
                edit.hook(parameter.register_post_accumulate_grad_hook, _hook(optimizer, steps, place, name))
                count += 1
            edit.set(optimizer, "_step_supports_amp_scaling", True)  # a GradScaler then shows itself to step()
            edit.hook(optimizer.register_step_pre_hook, _check_scaler)
        edit.note(f"{count} parameters are stepped in backward")


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def _places(optimizer: torch.optim.Optimizer) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Parameters that can be stepped in backward: their group's number, their own there, and themselves."""
    for number, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if parameter.requires_grad and parameter.is_leaf:
                yield (number, i), parameter


def _hook(
    optimizer: torch.optim.Optimizer, steps: Steps, place: tuple[int, int], name: str
) -> Callable[[Tensor], None]:
    owner = weakref.ref(optimizer)

    def arrived(parameter: Tensor) -> None:
        found = owner()
        if found is not None and parameter.grad is not None:
            _check_alone()
            steps.arrived(found, place, parameter, name)

    return arrived


def _check_scaler(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    held = vars(optimizer)
    if "found_inf" in held:  # set by a scaler that is at work
        del held["found_inf"]  # which it does not do where a step fails
        held.pop("grad_scale", None)
        raise InputError(
            "optimizer_in_backward: a GradScaler steps the optimizer, but parameters were stepped in backward already, "
            "with gradients that were scaled still. Train in bf16 or float32 without a scaler, or leave the pass out."
        )


def _check_alone() -> None:
    distributed: Any = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InputError(
            f"optimizer_in_backward: {distributed.get_world_size()} processes train together, and a parameter would be "
            "stepped before they have averaged its gradient. Train in one process, or leave the pass out."
        )
