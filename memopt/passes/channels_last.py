"""Convolutions with their channels innermost in memory, as most kernels for CPUs and tensor cores want them.

A kernel for such weights gives such results, so the layout spreads from the convolutions through the model by itself.
Without it these kernels make a copy of input, weight and result in their layout with each call, in backward once more.

Random numbers are drawn in the order of memory: a dropout between convolutions draws another mask from the same seed.

Parameters stay the same objects and get other memory. An optimizer's fused kernels read weights, gradients and states
as flat memory and do not look at their layout, so a step of states that lie differently than their weights would be
silently wrong: before each step of any optimizer, and by undo, states are laid out as their weights are. For steps that
a pass takes piece by piece or in backward, `memopt/optim.py` does that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from memopt.core import Edit
from memopt.errors import InputError
from memopt.memory.ledger import home_of
from memopt.nested import flatten
from memopt.optim import align, before_steps
from memopt.registry import Claim, Context, Pass
from memopt.tensors import is_memory, laid, storage_of, version_of

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_VIEWS = ("view size is not compatible", "must have a last dimension with stride 1")
"""What torch says of a view that a layout does not have."""


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Pass):
    """Weights of convolutions and image inputs with channels innermost: faster kernels, fewer copies for them."""

    name = "channels_last"
    stage = "rewrite"  # before weights go elsewhere
    exact = True
    rounding = True
    needs = "2-D or 3-D convolutions with weights in the default layout"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [Claim(path, "forward", "layout") for path, module in model.named_modules() if _found(model, module)]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        found = {id(p): p for claim in claims for p in _found(edit.model, edit.module(claim.path))}
        formats = {p.dim(): FORMATS[p.dim()] for p in found.values()}
        edit.hook(_Laid, list(found.values()))
        edit.wrap(edit.model, "forward", _around(formats))
        total = sum(p.nbytes for p in found.values())
        edit.note(f"{len(found)} weights of {len(claims)} convolutions, {total:,} bytes")
        if any(isinstance(module, _DropoutNd) and module.p for module in edit.model.modules()):
            edit.note("dropout draws other masks: numbers are drawn in the order of memory")


def _around(formats: dict[int, torch.memory_format]) -> Callable[..., Any]:
    def forward(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()  # which sees writes itself
        _, leaves, make = flatten((args, kwargs))
        copies: list[tuple[Tensor, int]] = []
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested and x.dim() in formats:
                copy = x.contiguous(memory_format=formats[x.dim()])
                if copy is not x:
                    leaves[i] = copy
                    copies.append((copy, 0 if compiling else version_of(copy)))
        if copies:
            args, kwargs = make(leaves)
        try:
            output = inner(*args, **kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in _VIEWS):
                raise
            raise InputError(
                f"channels_last: {type(module).__name__} takes a view of an image that only the default layout has "
                f"({error}) Use reshape there (contiguous before view_as_complex), or leave the pass out."
            ) from error
        if not compiling and any(version_of(copy) != version for copy, version in copies):
            raise InputError(
                f"channels_last: {type(module).__name__} changes its input in place, which is a copy here. Give it an "
                "input in channels_last, or leave the pass out."
            )
        return output

    return forward


def _found(model: nn.Module, module: nn.Module) -> list[nn.Parameter]:
    """The weights of a convolution that can be laid out anew: nobody else's memory, and there to stay."""
    if not isinstance(module, _ConvNd):
        return []
    weights = [p for p in module._parameters.values() if p is not None and p.dim() in FORMATS]
    return [p for p in weights if is_memory(p) and _by_default(p) and home_of(p) is None and _alone(model, p)]


def _by_default(parameter: Tensor) -> bool:
    return parameter.stride() == _strides(parameter, torch.contiguous_format)


def _alone(model: nn.Module, parameter: nn.Parameter) -> bool:
    others = {id(t) for t in (*model.parameters(), *model.buffers()) if storage_of(t) == storage_of(parameter)}
    return len(others) == 1


class _Laid:
    """Parameters in channels_last, for a while, and the states of their optimizers with them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        for parameter in parameters:
            _lay(parameter, FORMATS[parameter.dim()])
        seen = self.optimizers

        def before_step(_: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
            _check(optimizer)
            seen.add(optimizer)
            align(optimizer, _parameters(optimizer))

        self.hook = before_steps(parameters[0], before_step)

    def remove(self) -> None:
        """Lay them out as they were, with the values they have now."""
        self.hook.remove()
        for parameter in self.parameters:
            _lay(parameter, torch.contiguous_format)
        for optimizer in self.optimizers:
            try:
                align(optimizer, _parameters(optimizer))
            except InputError:
                optimizer.register_step_pre_hook(lambda optimizer, *_: align(optimizer, _parameters(optimizer)))


def _lay(parameter: nn.Parameter, memory_format: torch.memory_format) -> None:
    grad, parameter.grad = parameter.grad, None
    parameter.data = laid(parameter.data, _strides(parameter, memory_format))
    if grad is not None:
        parameter.grad = laid(grad, parameter.stride()) if is_memory(grad) else grad


def _strides(tensor: Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta", memory_format=memory_format).stride()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS) and any(
        p.dim() in FORMATS and not p.is_contiguous() for p in _parameters(optimizer)
    ):
        raise InputError(
            "channels_last: LBFGS joins all gradients to one vector in the default layout, which its weights do not "
            "have here. Use another optimizer, or leave the pass out."
        )
