"""The memory claims of the HAE V2 documents, checked by fake profiles of the full model (`brats128`, float32, AdamW).

    python bench/claims.py            # prints the figures of docs/claims.md, about two minutes on one core

Nothing here needs a GPU: the profiles count what a step on one would allocate (docs/profile.md says how). "Without the
outer product" is the published remedy at its very best: every condition of the batch is dropped and the product of the
conditions, with all that attention makes of it, is never built.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memopt
from memopt.memory import MemoryReport, fake
from memopt.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GIB = 1 << 30


class Zeroing(torch.optim.AdamW):
    """An optimizer as it was before torch 2.0: gradients are set to zero, not to None."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


def step(
    batch: int,
    *,
    passes: Sequence[str] = (),
    outer: Callable[[Tensor], Tensor | None] | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    train: bool = True,
) -> MemoryReport:
    """One step of brats128 on a GPU, as far as memory goes; ``outer`` takes the place of the model's outer product."""
    recipe = load_recipe(ROOT / "examples" / "hae_v2")
    config: Any = recipe.presets["brats128"]
    size = config.image_size
    with fake.new_mode():
        model: Any = recipe.model(config)
        if outer is not None:
            model._outer_product = outer
        x, t = torch.randn(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        kwargs = {"y": torch.zeros(batch, dtype=torch.long), "clf_free": True, "null": torch.zeros(batch).bool()}
        made = optimizer(model.parameters(), lr=1e-4)  # type: ignore[call-arg]
    return memopt.profile(
        model,
        ((x, t), kwargs),
        loss=lambda y: y.square().mean(),
        optimizer=made,
        passes=passes,
        train=train,
        device="cuda",
    )


def skipped(condition: Tensor) -> None:
    """The published computation where every condition is dropped."""


def largest(budget: int, low: int, **how: Any) -> int:
    """The largest batch from ``low`` (which fits) on whose peak fits the budget; peaks grow with the batch."""
    while step(low + 1, **how).peak <= budget:
        low += 1
    return low


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"torch {torch.__version__}; brats128, one float32 training step with AdamW, device cuda, sizes in GiB\n")
    print("| batch | the product itself, MiB | peak | peak without the outer product | ratio |")
    print("|---|---|---|---|---|")
    plain: dict[int, MemoryReport] = {}
    for batch in (10, 14, 20, 28, 32):
        plain[batch] = step(batch)
        without = step(batch, outer=skipped)
        product = next(s for s in plain[batch].skips if s.shape == (batch, 512, 512))
        print(
            f"| {batch} | {product.bytes / (1 << 20):.2f} | {plain[batch].peak / GIB:.2f} | {without.peak / GIB:.2f} "
            f"| {without.peak / plain[batch].peak:.3f} |"
        )
    print()
    for batch in (10, 14):
        found = largest(plain[batch].peak, batch, outer=skipped)
        print(f"largest batch in what batch {batch} needs, without the outer product: {found} (claimed: {2 * batch})")
    inference = {made: step(10, outer=None if made else skipped, train=False).peak for made in (True, False)}
    print(
        f"inference, batch 10: {inference[True] / GIB:.3f}, without the outer product {inference[False] / GIB:.3f} "
        f"(ratio {inference[False] / inference[True]:.3f})\n"
    )
    print("| batch | passes | peak | ratio to plain |")
    print("|---|---|---|---|")
    rows: list[tuple[str, dict[str, Any]]] = [
        ("zero_grad(set_to_none=False), as before torch 2.0", {"optimizer": Zeroing}),
        ("amp bf16", {"passes": ["amp"]}),
        ("checkpoint", {"passes": ["checkpoint"]}),
        ("checkpoint + amp bf16", {"passes": ["checkpoint", "amp"]}),
        ("offload_activations", {"passes": ["offload_activations"]}),
        (
            "outer_product + checkpoint + offload_activations",
            {"passes": ["outer_product", "checkpoint", "offload_activations"]},
        ),
    ]
    plain[1] = step(1)
    for batch in (1, 14):
        print(f"| {batch} | none | {plain[batch].peak / GIB:.2f} | 1.000 |")
        for name, how in rows:
            peak = step(batch, **how).peak
            print(f"| {batch} | {name} | {peak / GIB:.2f} | {peak / plain[batch].peak:.3f} |")


if __name__ == "__main__":
    main()
