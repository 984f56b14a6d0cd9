"""States of the optimizer in 8 bits between steps.

Adam keeps two numbers for each parameter, four bytes each; here each has one byte, and every 256 of them a scale. The
optimizer stays the user's own: for its step the states of a few parameters at a time become floats, and codes again
afterwards (`memopt/optim.py`). The codes are those of the dynamic blockwise quantization of Dettmers et al., "8-bit
Optimizers via Block-wise Quantization" (ICLR 2022), by bitsandbytes, with three differences:

- What is an average of squares is stored as its root, which is what a step divides by. The codes reach seven powers of
  ten down, for squares these are but three and a half of the gradient.
- Its codes have no zero. A parameter whose second moment is forgotten and whose first is not takes a step of any size
  (Li et al., "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023).
- The signed codes have both ends, 1 and -1. So the largest value of a block is exact, and codes made of what codes
  stand for are the same codes: a state that is saved, loaded or converted without a step between does not change.

A block with an inf or a NaN becomes NaN as a whole: a training that has gone wrong is not given finite numbers.

``state_dict`` gives floats. They load into an optimizer without the pass, and its states into one with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.core import Edit
from memopt.errors import InputError
from memopt.optim import Shelf, Shelved, check, kind_of, steps_of
from memopt.registry import Claim, Context, Pass
from memopt.tensors import is_memory
from memopt.units import parse_bytes

_BLOCK = 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SIGNED = frozenset({"exp_avg", "momentum_buffer"})
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"})
_STATES = {
    "adam": "exp_avg",
    "adamw": "exp_avg",
    "nadam": "exp_avg",
    "radam": "exp_avg",
    "sgd": "momentum_buffer",
    "_muon": "momentum_buffer",
    "rmsprop": "square_avg",
    "adadelta": "square_avg",
    "adagrad": "sum",
}
"""Modules of torch.optim whose states are all of these kinds, and one that they have."""


@dataclass(frozen=True, kw_only=True)
class Optimizer8bit(Pass):
    """The optimizer keeps its states in 8 bits: Adam's take 2.03 bytes a parameter instead of 8; not exact."""

    name: ClassVar[str] = "optimizer_8bit"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = (
        "an optimizer with states (SGD has them with momentum) of 4096 values at least: "
        "memopt.apply(..., optimizer=optimizer)"
    )
    changes: ClassVar[str] = (
        "after each step, states (of averages of squares: their roots) are rounded to within 1/140 of the largest in "
        "their block of 256 values; loss of a training within 2%"
    )

    min_values: int = 4096
    """States of parameters with fewer values stay as they are: they are biases and norms, small and sensitive."""
    at_once: int | str = "64MiB"
    """Bytes of parameters that are stepped at a time; for these the states are floats meanwhile."""

    def __post_init__(self) -> None:
        self._check_at_least(min_values=0)
        parse_bytes(self.at_once)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        found = []
        for i, optimizer in enumerate(context.optimizers):
            check(optimizer, self.name)
            kind = kind_of(optimizer)
            if kind not in _STATES or any(group.get("centered") for group in optimizer.param_groups):
                raise InputError(
                    f"{self.name}: {'a centered ' * (kind in _STATES)}{type(optimizer).__name__} has states that must "
                    "not be rounded. It takes Adam, AdamW, NAdam, RAdam, SGD, RMSprop (not centered), Adadelta, "
                    "Adagrad and Muon of torch.optim."
                )
            if any(
                p.numel() >= self.min_values and p.dtype in _FLOATS
                for group in optimizer.param_groups
                if kind != "sgd" or group["momentum"]
                for p in group["params"]
            ):
                found.append(Claim(f"{i}.state", "optimizer"))
        if found:
            _library()
        return found

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        for claim in claims:
            optimizer = edit.optimizers[int(claim.path.partition(".")[0])]
            shelf = _Codes(self.min_values, parse_bytes(self.at_once))
            edit.hook(Shelved, optimizer, steps_of(edit, optimizer), shelf, self.name)
            every = [p.numel() for group in optimizer.param_groups for p in group["params"]]
            coded = sum(n for n in every if n >= self.min_values)
            edit.note(f"states of {coded:,} of {sum(every):,} parameters in 8 bits")


class Coded(NamedTuple):
    """A state in 8 bits. Its tensors are found by whoever looks for tensors among the states."""

    codes: Tensor
    """Of the form that the state has."""
    scales: Tensor
    """One for each block of its values, in the order of memory."""
    about: tuple[torch.dtype, bool]
    """Its type, and whether it is the root that is coded."""


class _Codes(Shelf):
    """Has states as codes."""

    def __init__(self, min_values: int, at_once: int) -> None:
        self.min_values, self.at_once = min_values, at_once

    def put(self, name: str, state: Tensor, parameter: Tensor) -> Any:
        squares = name in _SQUARES
        if not squares and name not in _SIGNED:
            return state
        if state.shape != parameter.shape or state.dtype not in _FLOATS:
            return state
        if not self.min_values <= state.numel() < 2**31:  # the library counts in 32 bits
            return state
        if not is_memory(state) or not torch.ops.aten.is_non_overlapping_and_dense(state):
            return state
        return encode(state, squares)

    def get(self, kept: Any) -> Tensor | None:
        return decode(kept) if isinstance(kept, Coded) else None


def encode(state: Tensor, squares: bool) -> Coded:
    """A dense state as codes."""
    flat = state.as_strided((state.numel(),), (1,), state.storage_offset()).float()
    codes, scales = _quantize(flat.sqrt() if squares else flat, squares)
    return Coded(codes.as_strided(state.shape, state.stride()), scales, (state.dtype, squares))


def decode(coded: Coded) -> Tensor:
    """The state that codes stand for."""
    dtype, squares = coded.about
    codes = coded.codes
    flat = _dequantize(codes.as_strided((codes.numel(),), (1,)), coded.scales, squares)
    flat = (flat.square_() if squares else flat).to(dtype)
    return flat.as_strided(codes.shape, codes.stride())


def _quantize(flat: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    if isinstance(flat, FakeTensor):  # real tables and fake tensors do not mix
        return torch.empty_like(flat, dtype=torch.uint8), flat.new_empty(-(-flat.numel() // _BLOCK))
    table = _table(squares, flat.device)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise.default(flat, table, _BLOCK)
    if flat.device.type == "cpu":
        _search_again(flat, codes, scales, table)
    return codes, torch.where(_largest(flat).isfinite(), scales, torch.nan)  # a NaN has no code, nor what is by an inf


def _largest(flat: Tensor) -> Tensor:
    """The largest value of each block, or NaN if there is one."""
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = [flat[:whole].view(-1, _BLOCK)] if whole else []
    rest = [flat[whole:].view(1, -1)] if whole < flat.numel() else []
    return torch.cat([torch.linalg.vector_norm(x, torch.inf, dim=1) for x in (*blocks, *rest)])


def _search_again(flat: Tensor, codes: Tensor, scales: Tensor, table: Tensor) -> None:
    """Find the nearest codes of small values. On a CPU the library looks at the first 16 bits after the point alone."""
    first, end = (table.abs() < 2e-3).nonzero()[[0, -1], 0].tolist()
    rough = ((codes >= first) & (codes <= end)).nonzero()[:, 0]
    values = flat[rough] / scales[rough // _BLOCK]
    codes[rough] = torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _dequantize(codes: Tensor, scales: Tensor, squares: bool) -> Tensor:
    if isinstance(codes, FakeTensor):
        return torch.empty_like(codes, dtype=torch.float32)
    table = _table(squares, codes.device)
    flat: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, scales, table, _BLOCK, torch.float32)
    return flat


@functools.cache
def _table(squares: bool, device: torch.device) -> Tensor:
    """What codes stand for, in order."""
    values: Tensor = _library().create_dynamic_map(signed=not squares)
    smallest = values[values > 0].min()
    if squares:  # no zero
        values = torch.where(values == 0, smallest / 3, values)
    else:  # both ends
        values = torch.cat([values.new_tensor([-1.0]), values[values != smallest]])
    return values.to(device)


def _library() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError(f"optimizer_8bit needs bitsandbytes: pip install bitsandbytes ({error})") from None
