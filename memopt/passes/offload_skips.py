"""Skip connections wait off the device: what a UNet's decoder takes from its encoder, in training and inference.

They are found by their lifetimes in the first forward (`memopt/lifetimes.py`), and wait in host memory or in files from
their last early use to the next one (`memopt/skips.py`). In training, autograd, too, lets go of their memory until
backward. Together with `offload_activations` each moves once: the tape of that pass is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from memopt.compression import Compression
from memopt.core import Edit
from memopt.deferred import entered, made
from memopt.errors import InputError
from memopt.lifetimes import FAST, Learner, Plan
from memopt.registry import Claim, Context, Pass
from memopt.saved import hooks_allowed, hooks_in_force, in_checkpoint, unpack
from memopt.skips import Hooks, Run
from memopt.tape import Tape, tape_in_force
from memopt.tensors import storage_of
from memopt.transfer import Mover
from memopt.units import parse_bytes

_PLANS = "_memopt_skips"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


@dataclass(frozen=True, kw_only=True)
class OffloadSkips(Pass):
    """Skip connections wait off the device, in host memory or on disk, in training and inference."""

    name: ClassVar[str] = "offload_skips"
    stage: ClassVar = "wrap"
    exact: ClassVar[bool] = True
    needs: ClassVar[str] = "modules whose results the model may keep for later"

    to: Literal["cpu", "disk"] = "cpu"
    """Where they wait."""
    min_bytes: int | str = "1MiB"
    """Smaller tensors stay: moving them costs more than it gains."""
    waits: int = 16
    """A tensor is a skip connection if so many calls of leaf modules lie between two uses of it."""
    prefetch: int = 1
    """How many set out before they are asked for."""
    folder: str | None = None
    """Where files are kept (disk); by default the system's folder for temporary files."""
    compress: Compression | None = None
    """Round floating-point values on the way; not exact. ``int8`` needs bitsandbytes; memopt.compression has bounds."""

    def __post_init__(self) -> None:
        parse_bytes(self.min_bytes)
        self._check_at_least(prefetch=0, waits=1)
        try:
            self._mover()
        except InputError as error:
            raise InputError(f"offload_skips: {error}") from None
        object.__setattr__(self, "exact", self.compress is None)

    def _mover(self) -> Mover:
        return Mover(self.to, folder=self.folder, compress=self.compress)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [Claim("", "activations", "skip connections")] if any(True for _ in model.children()) else []

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        mover, counts, least = self._mover(), edit.counts, parse_bytes(self.min_bytes)

        def around(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._is_tracing() or forward_ad._current_level >= 0:
                return inner(*args, **kwargs)
            if in_checkpoint() or not hooks_allowed():
                return inner(*args, **kwargs)
            plans = vars(module).get(_PLANS)
            if plans is None:  # a copy has none
                plans = _Plans()
                object.__setattr__(module, _PLANS, plans)
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            held = {storage_of(tensor) for tensor in (*module.parameters(), *module.buffers(), *given)}
            tape = Tape(mover, held, None, self.prefetch, counts, hooks_in_force())
            way, size = (torch.is_grad_enabled(), module.training), sum(map(_bytes, given))
            plan = plans.of(way, size)
            if plan is not None and not plan.parks:
                return inner(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                if torch.is_grad_enabled() and tape_in_force() is None:
                    stack.enter_context(saved_tensors_hooks(tape.pack, unpack))
                if plan is not None:
                    stack.enter_context(Run(plan, tape, least, self.prefetch))
                    return entered(module, inner, *args, **kwargs)
                with Learner(module, least, self.waits) as learner:
                    result = inner(*args, **kwargs)
                plans.learned(module, way, size, learner.plan())
                counts["skip connections found"] = max(len(plan.parks) for plan in plans.by_way.values())
                return result

        def plainly(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = made(args), made(kwargs)
            with contextlib.ExitStack() as stack:
                modes = _get_current_function_mode_stack()
                if modes and all(
                    isinstance(mode, Learner) for mode in modes
                ):  # others are there in later forwards, too
                    stack.enter_context(torch._C.DisableTorchFunction())
                return inner(*args, **kwargs)

        for module in edit.model.modules():
            if isinstance(module, FAST):
                edit.wrap(module, "forward", plainly)
        plans = _Plans()
        edit.hook(lambda: plans)
        edit.set(edit.model, _PLANS, plans)
        edit.wrap(edit.model, "forward", around)


class _Plans:
    """What was learned of a model: a plan for each way to run it, and the hooks that follow them."""

    def __init__(self) -> None:
        self.by_way: dict[tuple[bool, bool], Plan] = {}
        self._sizes: dict[tuple[bool, bool], int] = {}
        self._handles: list[Any] = []

    def of(self, way: tuple[bool, bool], size: int) -> Plan | None:
        """The plan for a way of running and so many bytes of inputs; None if larger ones were never seen."""
        return self.by_way.get(way) if size <= self._sizes.get(way, -1) else None

    def learned(self, model: nn.Module, way: tuple[bool, bool], size: int, plan: Plan) -> None:
        """Keep a plan."""
        self.by_way[way], self._sizes[way] = plan, size
        for path in sorted(plan.modules):
            module = model.get_submodule(path)
            if not Hooks.on(module):
                self._handles += Hooks(path).put(module)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model learns anew."""
        return None
