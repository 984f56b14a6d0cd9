"""Give cached memory back at the boundaries of the loop: after sampling, evaluation and checkpoint saving.

Those phases allocate blocks of other sizes than a training step. What the CUDA allocator keeps of them fragments the
memory that the next steps need. Collecting garbage and emptying the cache there, a few times per thousand steps, costs
next to nothing; doing it every step only makes every step allocate anew, so this pass never does.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from memopt.core import PHASES, Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass


@dataclass(frozen=True, kw_only=True)
class CacheCleanup(Pass):
    """Collect garbage and empty the allocator's cache at phase ends, never in a step: less fragmentation."""

    name: ClassVar[str] = "cache_cleanup"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = True
    needs: ClassVar[str] = "a loop that names its phases with handle.phase(...); memopt's own does"

    after: tuple[str, ...] = PHASES
    """At the end of which phases."""

    def __post_init__(self) -> None:
        for phase in self.after:
            if phase not in PHASES:
                raise InputError(f"cache_cleanup: unknown phase {phase!r}; there are {', '.join(PHASES)}")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [Claim(phase, "loop") for phase in self.after]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        counts = edit.counts

        def clean() -> None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            elif torch.backends.mps.is_available():
                torch.mps.empty_cache()
            counts["cleanups"] += 1

        for claim in claims:
            edit.at_phase_end(claim.path, clean)
