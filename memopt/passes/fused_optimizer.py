"""The optimizer's step by torch's fused kernels, switched on in an optimizer that is there already.

On a GPU, torch's optimizers step all parameters by a list of operations, each over all of them (``foreach``), and their
temporaries take as much memory as the parameters. The fused kernel reads and writes each value once and has none.
``AdamW(..., fused=True)`` asks for it where the optimizer is made; this pass does where somebody else made it, and
keeps its states. ``state_dict`` says what it says without the pass.

The same is computed with other roundings on the way: weights are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from memopt.core import Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass

_OPTIONS = ("fused", "foreach")
_FUSED: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("cpu", "cuda", "mps", "xpu"),
    torch.optim.AdamW: ("cpu", "cuda", "mps", "xpu"),
    torch.optim.SGD: ("cpu", "cuda", "mps", "xpu"),
    torch.optim.Adagrad: ("cpu",),
}
"""Optimizers that have a fused kernel, and the devices it runs on."""
_SWITCHES = "_memopt_switches"


@dataclass(frozen=True, kw_only=True)
class FusedOptimizer(Pass):
    """The optimizer steps by one kernel: on a GPU without the temporaries of torch's default, and faster."""

    name: ClassVar[str] = "fused_optimizer"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = True
    rounding: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = (
        "an optimizer of torch.optim that has this implementation for its parameters and does not use it yet "
        "(fused: Adam, AdamW, SGD, on a CPU Adagrad): memopt.apply(..., optimizer=optimizer)"
    )

    implementation: Literal["fused", "foreach"] = "fused"
    """``foreach`` is for optimizers that have no fused kernel: faster than a loop, more memory."""

    def __post_init__(self) -> None:
        if self.implementation not in _OPTIONS:
            raise InputError(f"{self.name}: implementation {self.implementation!r} is not one of fused, foreach")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [Claim(f"{i}.kernels", "optimizer") for i, o in enumerate(context.optimizers) if self._fits(o)]

    def _fits(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        if any(self.implementation not in group or group.get("differentiable") for group in groups):
            return False
        if all(group[self.implementation] for group in groups):
            return False
        if self.implementation == "foreach":
            return True
        devices = next((d for kind, d in _FUSED.items() if isinstance(optimizer, kind)), ())
        every = [p for group in groups for p in group["params"]]
        return all(p.is_floating_point() and p.device.type in devices for p in every)

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        options = {name: name == self.implementation for name in _OPTIONS}
        for claim in claims:
            optimizer = edit.optimizers[int(claim.path.partition(".")[0])]
            switches = _Switches(optimizer, options)
            edit.hook(lambda switches=switches: switches)
            edit.wrap(optimizer, "state_dict", _around_state_dict)
            edit.wrap(optimizer, "load_state_dict", _around_load)
            edit.set(optimizer, _SWITCHES, switches)
            fused = self.implementation == "fused"
            # What torch notes where it is made so. A GradScaler lets the kernel unscale, where there is one for that.
            edit.set(optimizer, "_step_supports_amp_scaling", fused and not isinstance(optimizer, torch.optim.Adagrad))
            if fused:
                edit.set(optimizer, "_need_device_dtype_check_for_fused", True)
                edit.hook(optimizer.register_step_post_hook, _tell)


class _Switches:
    """The options of an optimizer's groups, changed until ``remove``."""

    def __init__(self, optimizer: Optimizer, options: Mapping[str, bool]) -> None:
        self._optimizer, self._options = optimizer, options
        self._before: list[dict[str, Any]] = []
        self._defaults = self._of(optimizer.defaults)
        optimizer.defaults.update({name: options[name] for name in self._defaults})  # for groups to come
        self.on()

    def on(self) -> None:
        """Change them; what they are now is what will be put back."""
        self._before = [self._of(group) for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group.update({name: self._options[name] for name in self._of(group)})
            if group.get("fused"):  # its kernel wants the number of the step where the parameter is
                for parameter in group["params"]:
                    _move_step(self._optimizer.state.get(parameter, {}), parameter.device)

    def remove(self) -> None:
        """Put them back."""
        self._optimizer.defaults.update(self._defaults)
        for group, before in zip(self._optimizer.param_groups, self.before(), strict=True):
            group.update(before)
            if not group.get("fused") and not group.get("capturable"):
                for parameter in group["params"]:
                    _move_step(self._optimizer.state.get(parameter, {}), torch.device("cpu"))

    def before(self) -> list[dict[str, Any]]:
        """What they were, by group; for a group that was added since, the defaults."""
        groups = self._optimizer.param_groups
        return [*self._before, *(self._defaults for _ in groups[len(self._before) :])]

    def _of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in self._options if name in group}


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Count the writes for autograd, which the fused kernels leave out: backward must not use a graph made before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    increment_version(parameters)


def _move_step(state: dict[str, Any], device: torch.device) -> None:
    if isinstance(state.get("step"), Tensor):
        state["step"] = state["step"].to(device)


def _around_state_dict(optimizer: Optimizer, inner: Callable[[], Any], /) -> Any:
    result, switches = inner(), vars(optimizer).get(_SWITCHES)
    if switches is not None:
        for group, before in zip(result["param_groups"], switches.before(), strict=True):
            group.update(before)
            if not group.get("fused") and not group.get("capturable"):
                for key in group["params"]:
                    if key in result["state"]:
                        result["state"][key] = dict(result["state"][key])
                        _move_step(result["state"][key], torch.device("cpu"))
    return result


def _around_load(optimizer: Optimizer, inner: Callable[..., Any], /, state_dict: Mapping[str, Any]) -> None:
    inner(state_dict)
    if (switches := vars(optimizer).get(_SWITCHES)) is not None:
        switches.on()
