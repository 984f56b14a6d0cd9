"""Automatic mixed precision: the model's forward runs under ``torch.autocast``, its output comes back in float32.

Weights, gradients and optimizer states stay as they are; what shrinks is the activations that autocast operations keep
for backward, to half at best. The training loop needs no change for bf16. For fp16 small gradients would underflow, so
the handle carries a gradient scaler (``handle.scaler``) that the loop must use; memopt's own loop does.

A legacy checkpoint function that forgets the autocast state would recompute in float32 what was computed in half
precision; calls of one are made to remember it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from memopt import legacy
from memopt.core import Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class AMP(Pass):
    """Run the forward in bf16 or fp16 where autocast deems it safe: activations up to 2x smaller; not exact."""

    name: ClassVar[str] = "amp"
    stage: ClassVar = "wrap"
    exact: ClassVar[bool] = False
    needs: ClassVar[str] = "floating-point parameters in float32"
    changes: ClassVar[str] = "matmuls and convolutions round to 8 (bf16) or 11 (fp16) significant bits; loss within 5%"

    dtype: Literal["bf16", "fp16"] = "bf16"
    """bf16 has the range of float32 and needs no scaler; fp16 is more precise and needs one."""
    float32_output: bool = True
    """Convert half-precision tensors in the output back to float32, so that the loss is computed in float32."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"amp: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        if not any(p.dtype == torch.float32 for p in model.parameters()):
            return []
        scaled = [Claim("step", "loop", "gradients")] if self.dtype == "fp16" else []  # they wait for the scaler
        return [Claim("", "forward", "precision"), *scaled]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        dtype, float32_output = DTYPES[self.dtype], self.float32_output

        def forward(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            device = next(module.parameters()).device.type
            with torch.autocast(device, dtype=dtype):
                output = inner(*args, **kwargs)
            if not float32_output:
                return output
            return tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype == dtype else t, output)

        def in_autocast(legacy_checkpoint: legacy.CheckpointFunction) -> legacy.CheckpointFunction:
            def run(func: Callable[..., Any], inputs: Sequence[Any], params: Any, flag: bool) -> Any:
                def autocast_func(*tensors: torch.Tensor) -> Any:
                    with torch.autocast(tensors[0].device.type, dtype=dtype):
                        return func(*tensors)

                return legacy_checkpoint(autocast_func, inputs, params, flag)

            return run

        for module in edit.model.modules():
            if rewritten := legacy.rewrite(type(module).forward, in_autocast):
                edit.wrap(module, "forward", legacy.instead(rewritten))
                edit.note(f"{type(module).__name__}: its own checkpoint function now recomputes in {self.dtype} too")
        edit.wrap(edit.model, "forward", forward)
        if self.dtype == "fp16":
            # The scale grows over thousands of steps: it is kept while other passes come and go.
            device = next(edit.model.parameters()).device.type
            edit.state.setdefault("scaler", torch.amp.GradScaler(device))
            edit.note("fp16: the loop must use handle.scaler (scale, unscale_, step, update)")
