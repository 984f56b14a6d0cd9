"""Skip connections wait off the device: what a UNet's decoder takes from its encoder, in training and inference.

They are found by their lifetimes in the first forward, and wait in host memory or in files from their last early use to
the next one (`memopt/skips.py`). In training, autograd, too, lets go of their memory until backward. Together with
`offload_activations` each moves once: the tape of that pass is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from memopt.compression import Compression
from memopt.core import Edit
from memopt.deferred import entered
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass
from memopt.saved import hooks_allowed, hooks_in_force, in_checkpoint
from memopt.skips import Hooks, Learner, Plan, Run
from memopt.tape import Tape, tape_in_force, unpack
from memopt.tensors import storage_of
from memopt.transfer import Mover
from memopt.units import parse_bytes

_PLANS = "_memopt_skips"


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
        for option, least in (("prefetch", 0), ("waits", 1)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"offload_skips: {option} must be at least {least}, not {value!r}")
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
            if torch.compiler.is_compiling() or in_checkpoint() or not hooks_allowed():
                return inner(*args, **kwargs)
            plans = vars(module).get(_PLANS)
            if plans is None:  # a copy has none
                plans = _Plans()
                object.__setattr__(module, _PLANS, plans)
            way = torch.is_grad_enabled(), module.training
            plan = plans.by_way.get(way)
            if plan is None:
                with Learner(module, least, self.waits) as learner:
                    result = inner(*args, **kwargs)
                plans.learned(module, way, learner.plan())
                counts["skip connections found"] = max(len(p.parks) for p in plans.by_way.values())
                return result
            if not plan.parks:
                return inner(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                held = [*module.parameters(), *module.buffers(), *tree_leaves((args, kwargs))]
                storages = {storage_of(value) for value in held if isinstance(value, Tensor)}
                tape = Tape(mover, storages, None, self.prefetch, counts, hooks_in_force())
                if torch.is_grad_enabled() and tape_in_force() is None:
                    stack.enter_context(saved_tensors_hooks(tape.pack, unpack))
                stack.enter_context(Run(plan, tape, least, self.prefetch))
                return entered(module, inner, *args, **kwargs)

        plans = _Plans()
        edit.hook(lambda: plans)
        edit.set(edit.model, _PLANS, plans)
        edit.wrap(edit.model, "forward", around)


class _Plans:
    """What was learned of a model: a plan for each way to run it, and the hooks that follow them."""

    def __init__(self) -> None:
        self.by_way: dict[tuple[bool, bool], Plan] = {}
        self._hooked: set[str] = set()
        self._handles: list[Any] = []

    def learned(self, model: nn.Module, way: tuple[bool, bool], plan: Plan) -> None:
        """Keep a plan."""
        self.by_way[way] = plan
        for path in plan.modules - self._hooked:
            module = model.get_submodule(path)
            if not Hooks.on(module):
                self._handles += Hooks(path).put(module)
            self._hooked.add(path)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model learns anew."""
        return None
