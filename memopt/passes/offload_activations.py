"""What autograd keeps for backward waits in host memory or in files, and comes back just before it is used.

Saved-tensor hooks around forward hand every tensor that autograd saves to a tape (memopt.tape), which moves it.
Parameters, buffers and what the caller gave the model stay: they are on the device anyhow.

What a checkpoint keeps is its blocks' inputs, and these are saved where the hooks see them; what a checkpoint computes
again is not kept at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from memopt.compression import Compression
from memopt.core import Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass, matching_modules
from memopt.saved import hooks_allowed, in_checkpoint, unpack
from memopt.tape import Tape
from memopt.tensors import storage_of
from memopt.transfer import Mover
from memopt.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class OffloadActivations(Pass):
    """Tensors that autograd keeps for backward wait off the device: in host memory or on disk."""

    name = "offload_activations"
    stage = "wrap"
    exact = True
    modes = frozenset({"train"})
    needs = "a model that is trained; with blocks=PATTERN, modules of such names"

    to: Literal["cpu", "disk"] = "cpu"
    """Where they wait."""
    blocks: str | tuple[str, ...] = ""
    """Only what the outermost modules keep whose names match this glob, or one of several; empty: the whole model."""
    min_bytes: int | str = "1MiB"
    """Smaller storages stay: moving them costs more than it gains."""
    prefetch: int = 1
    """How many storages set out before they are asked for."""
    folder: str | None = None
    """Where files are kept (disk); by default the system's folder for temporary files."""
    compress: Compression | None = None
    """Round floating-point values on the way; not exact. ``int8`` needs bitsandbytes; memopt.compression has bounds."""

    def __post_init__(self) -> None:
        parse_bytes(self.min_bytes)
        self._check_at_least(prefetch=0)
        try:
            self._mover()
        except InputError as error:
            raise InputError(f"offload_activations: {error}") from None
        object.__setattr__(self, "exact", self.compress is None)

    def _mover(self) -> Mover:
        return Mover(self.to, folder=self.folder, compress=self.compress)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        if self.blocks:
            # Hooks inside a checkpoint's would keep what it means to compute again.
            found = [Claim(path, "activations", "activations") for path in matching_modules(model, self.blocks)]
        else:
            found = [Claim("", "activations", "saved tensors")] if any(True for _ in model.parameters()) else []
        for claim in found:
            for path, module in model.get_submodule(claim.path).named_modules(prefix=claim.path):
                if isinstance(module, nn.RReLU):
                    raise InputError(
                        f"offload_activations: {path or 'the model'} is an RReLU, whose noise autograd saves before it "
                        "is drawn, so that what moves would not be it. Choose blocks without it, or another activation."
                    )
        return found

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        mover, counts, least, blocks = self._mover(), edit.counts, parse_bytes(self.min_bytes), self.blocks

        def around(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_checkpoint() or not hooks_allowed():
                return inner(*args, **kwargs)
            # What the caller gave the model is on the device anyhow; what a block is given is an activation.
            held = [*module.parameters(), *module.buffers(), *(() if blocks else tree_leaves((args, kwargs)))]
            tape = Tape(mover, {storage_of(x) for x in held if isinstance(x, Tensor)}, least, self.prefetch, counts)
            with saved_tensors_hooks(tape.pack, unpack):
                return inner(*args, **kwargs)

        for claim in claims:
            edit.wrap(edit.module(claim.path), "forward", around)
