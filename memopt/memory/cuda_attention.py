"""Attention as CUDA computes it: which kernel torch chooses, and the operators that it calls for that.

The rules are those of ``scaled_dot_product_attention`` in ATen/native/transformers/attention.cpp and of
``select_sdp_backend`` with its checks in cuda/sdp_utils.cpp and sdp_utils_cpp.h beside it. The fused kernels keep
query, key, value, output and one float32 per head and query (the logarithm of the sum of exponentials), instead of the
matrix of scores; their dropout keeps no mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` with the operators that it calls on CUDA; NotImplemented for wrong arguments."""
    if query.is_nested or len({query.dtype, key.dtype, value.dtype}) > 1:
        return NotImplemented
    chosen = choice(query, key, value, attn_mask, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.full((), -math.inf, dtype=query.dtype, device=query.device))
    keeps_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if chosen == SDPBackend.FLASH_ATTENTION:
        size = query.shape[-1]
        if size % 8:
            query, key, value = (functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
        made = _ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
        return made[0][..., :size] if size % 8 else made[0]
    if chosen == SDPBackend.EFFICIENT_ATTENTION:
        if attn_mask is not None:
            attn_mask = _aligned(attn_mask).expand(*query.shape[:3], key.shape[2])
        return _ATEN._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, scale=scale
        )[0]
    if chosen == SDPBackend.CUDNN_ATTENTION:
        return _ATEN._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, False, scale=scale
        )[0]
    return _ATEN._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def choice(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> SDPBackend:
    """The kernel that torch chooses: the first, in the order that is set, that is enabled and fits.

    Raises:
        RuntimeError: none does, as on CUDA.
    """
    every = (query, key, value)
    four = all(t.dim() == 4 for t in every)
    batches = {t.shape[0] for t in every}
    heads = [t.shape[-3] if t.dim() > 2 else 1 for t in every]
    sizes = [t.shape[-1] for t in every]
    same_heads = len(set(heads)) == 1
    grouped = heads[1] == heads[2] and heads[0] % heads[1] == 0
    whole = four and len(batches) == 1 and 0 not in (query.shape[-2], key.shape[-2])
    dense = all(t.stride(-1) == 1 for t in (*every, *([] if mask is None else [mask])))
    aligned = 8 if query.dtype in _HALF else 4
    low = query.dtype in _HALF
    fits = {
        SDPBackend.FLASH_ATTENTION: whole
        and low
        and mask is None
        and (dense or sizes[0] == 1)
        and len(set(sizes)) == 1
        and sizes[0] <= 256
        and (grouped if enable_gqa else same_heads)
        and not (is_causal and query.shape[-2] != key.shape[-2]),
        SDPBackend.EFFICIENT_ATTENTION: whole
        and (low or query.dtype is torch.float32)
        and dense
        and sizes[0] == sizes[1]
        and not any(size % aligned or not size for size in sizes)
        and same_heads,
        SDPBackend.CUDNN_ATTENTION: whole
        and low
        and dense
        and not any(size % 8 or size > 128 for size in sizes)
        and (grouped if enable_gqa else same_heads),
        SDPBackend.MATH: True,
    }
    for number in torch._C._get_sdp_priority_order():
        kind = SDPBackend(number)
        if kind in fits and fits[kind] and _ENABLED[kind]():
            return kind
    raise RuntimeError("No available kernel. Aborting execution.")


def _aligned(mask: Tensor) -> Tensor:
    """The mask, or a padded copy of it where the memory-efficient kernel could not read it (preprocess_mask)."""
    if mask.stride(-1) == 1 and not any(stride % 8 for stride in mask.stride()[:-1]):
        return mask
    size = mask.shape[-1]
    return functional.pad(mask, (0, 8 - size % 8))[..., :size]
