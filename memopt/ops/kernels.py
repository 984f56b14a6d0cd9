"""Fused attention by packages other than torch, as functions of q [B, H, T, d], k [B, H, S, d], v [B, H, S, e], scale.

They run on CUDA only. Each refuses what it cannot do, in its own words.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memopt.errors import InputError

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]

PACKAGES = {"fa3": "flash_attn_interface", "xformers": "xformers", "sage": "sageattention"}
"""FlashAttention-3 (Shah et al. 2024), xFormers, SageAttention (Zhang et al. 2024): where they are imported from."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's own, by whichever kernel it chooses or is told to."""
    return scaled_dot_product_attention(q, k, v, scale=scale)


def package_attention(name: str) -> Attend:
    """The attention of a package in ``PACKAGES``.

    Raises:
        InputError: it is not installed.
    """
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"fused_attention: backend {name!r} needs the package {package}, which is not installed")
    return {"fa3": _fa3, "xformers": _xformers, "sage": _sage}[name]


def _fa3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, T, H, d] in half precision; some releases return the log-sum-exp as well."""
    module: Any = importlib.import_module("flash_attn_interface")
    out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    mixed: Tensor = out[0] if isinstance(out, tuple) else out
    return mixed.transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, T, H, d]."""
    module: Any = importlib.import_module("xformers.ops")
    mixed: Tensor = module.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return mixed.transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Quantizes q and k to 8 bits; has no backward."""
    module: Any = importlib.import_module("sageattention")
    mixed: Tensor = module.sageattn(q, k, v, tensor_layout="HND", sm_scale=scale, is_causal=False)
    return mixed
