"""What is moved in place of a tensor's values when they may be rounded, and what makes values of that again.

========  ============================  ==================================================================
``bf16``  float32, float64              two bytes a value, within 1/256 of each
``fp8``   float32, bfloat16, float16    one byte (e4m3) and one scale: within 1/16 of each down to 1/28,000 of the
                                        tensor's largest, below that within 1/450,000 of the largest
``int8``  float32, bfloat16, float16    one byte, blockwise (bitsandbytes): within 1/140 of the largest of each block
                                        of 512 values, finer near zero, and zeros stay zeros
========  ============================  ==================================================================

To that comes rounding to the tensor's own type. Other types are moved as they are. Values that are not finite come back
as such (those of fp8 and int8 as NaN) and alone: others do not suffer from them. What scales the values stays on the
device: 4 bytes for a tensor (fp8), 4 bytes for each block (int8: 1/512 of float32's bytes, 1/256 of the others').
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memopt.errors import InputError
from memopt.memory.ledger import off_the_books

Compression = Literal["bf16", "fp8", "int8"]
Decode = Callable[[Tensor], Tensor]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 512
_ZERO, _NAN = 127, 255
"""Codes: that of zero, and the one that stands for what is not finite."""


def check(compress: str | None) -> None:
    """Raise an InputError for what is no compression, or one that lacks its library."""
    if compress not in (None, *get_args(Compression)):
        raise InputError(f"compress={compress!r} is not one of {', '.join(get_args(Compression))}")
    if compress == "int8":
        try:
            _library()
        except ImportError as error:
            raise InputError(f"compress='int8' needs bitsandbytes: pip install bitsandbytes ({error})") from None


def encode(flat: Tensor, compress: Compression | None) -> tuple[Tensor, Decode]:
    """What to move for a flat tensor, and what makes it of that again."""
    dtype = flat.dtype
    if compress == "bf16" and dtype in (torch.float32, torch.float64):
        return flat.to(torch.bfloat16), lambda narrow: narrow.to(dtype)
    if compress == "fp8" and dtype in _NARROW and flat.numel():
        wide = flat.float()
        largest = torch.where(wide.isfinite(), wide, 0).abs().amax()
        scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=torch.finfo(torch.float32).tiny)
        finite = torch.where(wide.isfinite(), wide / scale, torch.nan)  # an infinity would become a number
        return finite.to(torch.float8_e4m3fn), lambda narrow: (narrow.float() * scale).to(dtype)
    if compress == "int8" and dtype in _NARROW and 0 < flat.numel() < 2**31:  # its kernels count in 32 bits
        return _blockwise(flat)
    return flat, lambda same: same


def _blockwise(flat: Tensor) -> tuple[Tensor, Decode]:
    dtype, finite = flat.dtype, flat.isfinite()
    codes, scales = _quantize(torch.where(finite, flat, 0))
    # The library's search gives the next code on a CPU, also for zeros, by which ReLU knows what it cut off; and any
    # code where a block's scale is so small that it has no inverse.
    codes.clamp_(max=_NAN - 1).masked_fill_(flat == 0, _ZERO).masked_fill_(~finite, _NAN)
    return codes, lambda codes: _dequantize(codes, scales, dtype).detach()  # a ledger sees the two at once


def _quantize(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and the blocks' scales. Ledgers see them when they are used, and not the library's small tables."""
    with off_the_books():
        if isinstance(flat, FakeTensor):  # real tables and fake tensors do not mix
            blocks = -(-flat.numel() // _BLOCK)
            return flat.new_empty(flat.shape, dtype=torch.uint8), flat.new_empty(blocks, dtype=torch.float32)
        nearest, _ = _tables(flat.device)
        codes, state = _library().quantize_blockwise(flat, code=nearest, blocksize=_BLOCK)
        return codes, state.absmax


def _dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    with off_the_books():
        if isinstance(codes, FakeTensor):
            return codes.new_empty(codes.shape, dtype=dtype)
        _, values = _tables(codes.device)
        library = _library()
        state = library.QuantState(absmax=scales, code=values, blocksize=_BLOCK, dtype=dtype)
        result: Tensor = library.dequantize_blockwise(codes, state)
        return result


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values by code: to find the nearest, where the last is near none, and to give back."""
    values = _library().create_dynamic_map()
    values = values[values != values[values > 0].min()]  # makes room for the last
    nearest, back = (torch.cat([values, values.new_tensor([last])]).to(device) for last in (2.0, torch.nan))
    return nearest, back


def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")
