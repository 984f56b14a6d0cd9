"""Attention that a model writes out, as torch's fused operation.

softmax(q k) v makes the weights [N, heads, T, S], in float32 as often as not, and keeps them for backward.
``scaled_dot_product_attention`` computes the same in tiles. The pass finds modules whose code has a softmax and matrix
products, and lets the products be deferred while they run (memopt.deferred): where queries times keys are scaled, cast,
put through a softmax over the keys and multiplied with values, in whatever layout, the whole becomes one call. Dropout
on the weights, masks and whatever else happens on the way make the weights as before.

Fused kernels add up in float32, as careful code does by hand, so the result is as accurate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from memopt.core import Edit
from memopt.deferred import Attentions, counting, made
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass
from memopt.source import writes_attention

BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


@dataclass(frozen=True, kw_only=True)
class FusedAttention(Pass):
    """Attention that is written out, softmax(q k) v, runs as one fused operation; its weights are not kept."""

    name = "fused_attention"
    stage = "rewrite"
    exact = True
    needs = (
        "modules that write attention out: a softmax and matrix products (einsum, matmul, bmm) in their code. What "
        "calls scaled_dot_product_attention already has nothing to gain"
    )

    backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Which kernel: torch's choice, or this one, and an error where it cannot run."""

    def __post_init__(self) -> None:
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise InputError(f"fused_attention: backend {self.backend!r} is not one of auto, {', '.join(BACKENDS)}")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [
            Claim(path, "graph", "attention")
            for path, module in model.named_modules()
            if writes_attention(type(module)) and not _is_fused(module)
        ]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        tell = counting(edit.counts)

        def around(module: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with Attentions(tell), self._kernel():
                return made(inner(*args, **kwargs))

        for claim in claims:
            edit.wrap(edit.module(claim.path), "forward", around)

    def _kernel(self) -> Any:
        if self.backend == "auto":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, BACKENDS[self.backend]))


def _is_fused(module: nn.Module) -> bool:
    """Whether a module whose code can write attention out is set to call a fused operation.

    diffusers keeps what is called in ``processor``, transformers names it in the configuration.
    """
    processor = getattr(module, "processor", None)
    if processor is not None and not isinstance(processor, nn.Module):
        return not writes_attention(type(processor), "get_attention_scores")
    return getattr(getattr(module, "config", None), "_attn_implementation", None) not in (None, "eager")
