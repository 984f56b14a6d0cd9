"""Plans: passes that keep a step within a budget of bytes, found without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memopt.planning.plans import Plan as Plan


def plan(
    model: nn.Module,
    inputs: Any,
    budget: int | float | str,
    *,
    train: bool = True,
    loss: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | None = None,
    allow: Sequence[str] = ("exact",),
    hardware: Any = None,
    passes: Sequence[Any] = (),
) -> Plan:
    """The fastest passes whose predicted peak stays within a budget. The model is left as it is.

    Args:
        model: any module without passes applied.
        inputs: what it is called with, as for ``memopt.profile``.
        budget: bytes, or a text such as ``"8GiB"``, for all tensors on the device.
        train, loss, optimizer, device: as for ``memopt.profile``.
        allow: ``"exact"`` and names of passes that are not: ``"amp"``, ``"optimizer_8bit"``. These are used where exact
            ones do not suffice.
        hardware: a ``memopt.hardware.Hardware``, a table of its figures, or a name such as ``"h100"``. Default: this
            machine, measured; an A100 for ``device="cuda"`` where there is none.
        passes: passes that shall be part of the plan in any case.

    Raises:
        DoesNotFit: no plan fits; the message has the smallest budget that one fits, and what holds it.
        InputError: bad arguments.
    """
    from memopt.units import parse_bytes

    size = parse_bytes(budget, "budget")
    found: Plan = search(
        model,
        inputs,
        train=train,
        loss=loss,
        optimizer=optimizer,
        device=device,
        allow=allow,
        hardware=hardware,
        passes=passes,
    ).plan(size)
    return found


def search(
    model: nn.Module,
    inputs: Any,
    *,
    train: bool = True,
    loss: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | None = None,
    allow: Sequence[str] = ("exact",),
    hardware: Any = None,
    passes: Sequence[Any] = (),
) -> Any:
    """The search that ``plan`` runs, for several budgets; arguments as for ``plan``."""
    from memopt import core
    from memopt.errors import InputError
    from memopt.hardware import hardware_for
    from memopt.memory.profiler import make_work
    from memopt.planning.planner import Search

    if isinstance(model, nn.Module) and (active := core.active_passes(model).passes):
        raise InputError(
            f"the model has passes applied ({', '.join(map(str, active))}): undo them, and give those that shall stay "
            "as passes="
        )
    work = make_work(model, inputs, train=train, loss=loss, optimizer=optimizer)
    placed = sorted({p.device.type for p in model.parameters()} - {"meta"}) or ["cpu"]
    kind = device or placed[-1]
    return Search(
        work,
        train=train,
        device=kind,
        hardware=hardware_for(hardware, kind),
        allow=allow,
        given=passes,
    )
