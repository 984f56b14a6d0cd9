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
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memopt.core import Edit
from memopt.deferred import Attentions, counting, entered, followed
from memopt.errors import InputError, MemoptError
from memopt.ops.kernels import PACKAGES, package_attention, torch_attention
from memopt.registry import Claim, Context, Pass
from memopt.source import matrix_products, writes_attention

TORCH = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
BACKENDS = ("auto", *TORCH, *PACKAGES)


@dataclass(frozen=True, kw_only=True)
class FusedAttention(Pass):
    """Attention that is written out, softmax(q k) v, runs as one fused operation; its weights are not kept."""

    name = "fused_attention"
    stage = "rewrite"
    exact = True
    rounding = True
    needs = (
        "modules that write attention out: a softmax and matrix products (einsum, matmul, bmm) in their code. What "
        "calls scaled_dot_product_attention already has nothing to gain"
    )

    backend: Literal["auto", "flash", "efficient", "cudnn", "math", "fa3", "xformers", "sage"] = "auto"
    """Which kernel: torch's choice; this one of torch's; or that of a package (CUDA only). An error where it cannot
    run. sage (SageAttention) quantizes queries and keys to 8 bits and has no backward: not exact."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"fused_attention: backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        object.__setattr__(self, "exact", self.backend != "sage")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [
            Claim(path, "graph", "attention")
            for path, module in model.named_modules()
            if _writes_attention(module) and not _is_fused(module)
        ]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        tell = counting(edit.counts)
        attend = package_attention(self.backend) if self.backend in PACKAGES else torch_attention

        def follow(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            with self._kernel():
                return followed(Attentions(tell, attend), module, inner, *args, **kwargs)

        def outermost(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return entered(module, functools.partial(follow, module, inner), *args, **kwargs)

        for claim in claims:
            module = edit.module(claim.path)
            # Also the methods themselves: a model may call them again in backward.
            for method in {*matrix_products(type(module), _helper(module))} - {"forward"}:
                edit.wrap(module, method, follow)
            edit.wrap(module, "forward", outermost)

    def _kernel(self) -> contextlib.AbstractContextManager[None]:
        if self.backend not in TORCH:
            return contextlib.nullcontext()
        kernel = sdpa_kernel(getattr(SDPBackend, TORCH[self.backend]))
        return kernel if torch.compiler.is_compiling() else self._with_reason(kernel)

    @contextlib.contextmanager
    def _with_reason(self, kernel: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        try:
            with kernel:
                yield
        except RuntimeError as error:
            if "backend" not in str(error) and "kernel" not in str(error):
                raise
            raise MemoptError(
                f"fused_attention: torch's {self.backend} kernel cannot run this attention here ({error}). "
                "backend='auto' lets torch choose"
            ) from error


def _writes_attention(module: nn.Module) -> bool:
    cls, helper = type(module), _helper(module)
    softmax = any(isinstance(child, nn.Softmax) for child in module.children())
    return writes_attention(cls, helper) or (softmax and bool(matrix_products(cls, helper)))


def _helper(module: nn.Module) -> type | None:
    """What diffusers' attention leaves the computation to, which may call the module's own methods for it."""
    processor = getattr(module, "processor", None)
    return None if processor is None or isinstance(processor, nn.Module) else type(processor)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module whose code can write attention out is configured to call a fused operation (transformers)."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) not in (None, "eager")
