"""Run true steps on a model and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Sequence[nn.Module], inputs: Sequence[Tensor]
) -> Iterator[None]:
    """Put back, bit for bit, what steps inside change: weights, buffers, gradients, optimizer, modes, random states.

    Copies are held on the CPU meanwhile. Gradients are set aside, so that the steps begin without any. Plain Python
    attributes that a module's forward sets are the module's own affair.
    """
    modules = [m for root in (model, *extra) for m in root.modules()]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    values = [(t, _copy(t)) for t in {id(t): t for t in (*tensors, *inputs)}.values()]
    holders = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in modules]
    gradients = [(t, t.grad) for t, _ in values if t.is_leaf]
    generators = [(g, g.get_state()) for m in modules for g in vars(m).values() if isinstance(g, torch.Generator)]
    optimizer_state = _state_of(optimizer)
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    for tensor, _ in gradients:
        tensor.grad = None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, parameters, buffers, training in holders:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.training = training
        with torch.no_grad():
            for tensor, value in values:
                tensor.detach().copy_(value)
        for tensor, gradient in gradients:
            tensor.grad = gradient
        for generator, state in generators:
            generator.set_state(state)
        _put_back(optimizer, optimizer_state)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _state_of(optimizer: torch.optim.Optimizer | None) -> Any:
    if optimizer is None:
        return None
    states = {
        parameter: [(key, value, _copy(value) if isinstance(value, Tensor) else None) for key, value in state.items()]
        for parameter, state in optimizer.state.items()
    }
    return states, [dict(group) for group in optimizer.param_groups]


def _put_back(optimizer: torch.optim.Optimizer | None, kept: Any) -> None:
    if optimizer is None:
        return
    states, groups = kept
    optimizer.state.clear()
    for parameter, items in states.items():
        for key, value, copied in items:
            if copied is not None:
                value.detach().copy_(copied)
            optimizer.state[parameter][key] = value
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)
