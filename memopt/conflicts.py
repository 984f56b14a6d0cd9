"""Which passes want the same thing of a model, told from their claims alone: nothing is applied."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memopt.registry import Claim, Context, Pass, available_passes, resolve


@dataclass(frozen=True)
class Conflict:
    """Two passes that both change one thing; printed, it is what a PassConflict says."""

    first: Pass
    second: Pass
    claim: Claim
    """The inner one of the two places."""

    @property
    def way_out(self) -> str:
        """What to do about it. Optimizers have no places: a pass works on all that it is given."""
        return "leave one out" + ("" if self.claim.aspect == "optimizer" else ", or give them different places")

    def __str__(self) -> str:
        way_out = self.way_out[0].upper() + self.way_out[1:]
        return f"{self.first} and {self.second} both change the {self.claim}. {way_out}."


def between(first: Pass, claims: Sequence[Claim], second: Pass, others: Sequence[Claim]) -> Conflict | None:
    """The first place that two passes both claim, if there is one."""
    for a, b in itertools.product(claims, others):
        if a.overlaps(b):
            return Conflict(first, second, a if len(a.path) > len(b.path) else b)
    return None


def conflicts(
    model: nn.Module, passes: Sequence[Any] | None = None, *, optimizer: torch.optim.Optimizer | None = None
) -> list[Conflict]:
    """The pairs of passes that ``apply`` would refuse to put on this model together.

    Args:
        model: any module; passes that find nothing to do in it meet nobody.
        passes: objects, names or tables as for ``apply``; default: all there are, with their default options.
        optimizer: the optimizer of the training loop, for passes that need one.
    """
    chosen = [pass_ for like in (available_passes() if passes is None else passes) for pass_ in resolve(like)]
    context = Context(() if optimizer is None else (optimizer,))
    planned = [(pass_, pass_.plan(model, context)) for pass_ in chosen]
    met = (between(*a, *b) for a, b in itertools.combinations(planned, 2))
    return [conflict for conflict in met if conflict is not None]


def markdown(found: Sequence[Conflict]) -> str:
    """The conflicts as a table in Markdown."""
    rows = [f"| `{c.first}` | `{c.second}` | {c.claim} | {c.way_out} |" for c in found]
    return "\n".join(["| pass | and pass | both change | way out |", "|---|---|---|---|", *rows])
