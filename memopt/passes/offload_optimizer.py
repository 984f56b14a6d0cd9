"""States of the optimizer wait in host memory or in files, and are on the device for their parameters' step only.

A step goes through the parameters a piece at a time (`memopt/optim.py`). The states of a piece come, the optimizer
steps it, and they leave again; those of the next piece set out meanwhile. What moves them is `memopt/transfer.py`, on
streams of its own on a GPU. Nothing is computed in another way, so the weights are those of the plain optimizer, bit by
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memopt.core import Edit
from memopt.errors import InputError
from memopt.memory.ledger import home_of
from memopt.optim import Shelf, Shelved, check, steps_of
from memopt.registry import Claim, Context, Pass
from memopt.tensors import is_memory
from memopt.transfer import Mover, Parked
from memopt.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class OffloadOptimizer(Pass):
    """The optimizer's states live in host memory or on disk: with Adam, 8 bytes a parameter less on the device."""

    name: ClassVar[str] = "offload_optimizer"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = (
        "an optimizer that has states (SGD has them with momentum): memopt.apply(..., optimizer=optimizer)"
    )

    to: Literal["cpu", "disk"] = "cpu"
    """Where they live."""
    at_once: int | str = "64MiB"
    """Bytes of parameters that are stepped at a time; their states, and those of as many more, are on the device."""
    min_bytes: int | str = "16KiB"
    """Smaller states stay: moving them costs more than it gains."""
    folder: str | None = None
    """Where files are kept (disk); by default in the system's folder for temporary files."""

    def __post_init__(self) -> None:
        parse_bytes(self.at_once)
        parse_bytes(self.min_bytes)
        try:
            self._mover()
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None

    def _mover(self) -> Mover:
        return Mover(self.to, folder=self.folder)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        found = []
        for i, optimizer in enumerate(context.optimizers):
            check(optimizer, self.name)
            if not isinstance(optimizer, torch.optim.SGD) or any(g["momentum"] for g in optimizer.param_groups):
                found.append(Claim(f"{i}.state", "optimizer"))
        return found

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        for claim in claims:
            optimizer = edit.optimizers[int(claim.path.partition(".")[0])]
            shelf = _Away(self._mover(), parse_bytes(self.min_bytes), parse_bytes(self.at_once))
            edit.hook(Shelved, optimizer, steps_of(edit, optimizer), shelf, self.name)
        edit.note(f"states live {'in host memory' if self.to == 'cpu' else 'on disk'} between steps")


class _Waiting:
    """A state that is away, and its form."""

    def __init__(self, parked: Parked, state: Tensor) -> None:
        self.parked, self.shape, self.stride = parked, state.shape, state.stride()


class _Away(Shelf):
    """Has states on a tier."""

    def __init__(self, mover: Mover, min_bytes: int, at_once: int) -> None:
        self.mover, self.min_bytes, self.at_once = mover, min_bytes, at_once

    def put(self, name: str, state: Tensor, parameter: Tensor) -> Any:
        if state.nbytes < self.min_bytes or not state.dim() or not is_memory(state):
            return state
        if home_of(parameter) is not None or state.device != parameter.device:  # it is away with its parameter
            return state
        if not torch.ops.aten.is_non_overlapping_and_dense(state):
            return state
        flat = state.as_strided((state.numel(),), (1,), state.storage_offset())
        return _Waiting(self.mover.out(flat), state)

    def get(self, kept: Any) -> Tensor | None:
        return kept.parked.get().as_strided(kept.shape, kept.stride) if isinstance(kept, _Waiting) else None

    def fetch(self, kept: Any) -> None:
        if isinstance(kept, _Waiting):
            kept.parked.fetch()

    def close(self) -> None:
        self.mover.close()
