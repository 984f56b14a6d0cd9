"""The conditional outer product: as published, and as memopt's pass does it.

    python bench/outer_product.py            # prints the tables of docs/benchmarks.md, some minutes on one core
    python bench/outer_product.py --quick    # attention blocks without zero rows only, fewer repetitions

Four ways to the same attention over a condition squared to c (x) c, side by side in one run: *dense*, as the model is
written; *published*, the conditional computation of the HAE V2 documents, written from their description (nothing if
all rows are zero, else a tensor of zeros into which the products of the others are copied); *sparse* and *rank_one*,
the modes of `OuterProduct`. Kept and peak are exact (storages of a true step, above what was there before); times are
medians of interleaved runs as a ratio to dense; the error is that of the output and of all gradients against dense in
float64, relative to the largest entry, as a multiple of dense float32's own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memopt
from memopt.passes import OuterProduct
from memopt.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB, GIB = 1 << 20, 1 << 30
LEVELS = ((256, 32), (384, 16), (512, 8))
"""Channels and side of the three attention levels of `brats128`."""
SHARES = (0.0, 0.1, 0.5, 1.0)
WAYS = ("dense", "published", "sparse", "rank_one")


def published(c: Tensor, threshold: float = 1e-6) -> Tensor | None:
    """The product as the documents describe its conditional computation."""
    if torch.allclose(c, torch.zeros_like(c), atol=threshold):
        return None
    active = (c.abs() > threshold).any(dim=1)
    if bool(active.all()):
        return torch.einsum("ab,ac->abc", c, c)
    rows = active.nonzero()[:, 0]
    whole = torch.zeros(*c.shape, c.shape[1], dtype=c.dtype, device=c.device)
    whole[rows] = torch.einsum("ab,ac->abc", c[rows], c[rows])
    return whole


class Level(nn.Module):
    """One attention block of HAE V2 with the condition's product made beside it."""

    def __init__(self, channels: int, width: int = 512, heads: int = 4) -> None:
        super().__init__()
        from examples.hae_v2.blocks import AttentionBlock

        self.block = AttentionBlock(channels, heads, width)
        self.published = False
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tokens = published(c) if self.published else torch.einsum("ab,ac->abc", c, c)
        out: Tensor = self.block(x, tokens)
        return out


def arranged(plain: Level, way: str) -> Level:
    model = copy.deepcopy(plain)
    if way == "published":
        model.published = True
    elif way != "dense":
        memopt.apply(model, [OuterProduct(mode=way)])  # type: ignore[arg-type]
    return model


def step(model: nn.Module, x: Tensor, c: Tensor) -> dict[str, Tensor | None]:
    """The output and the gradients of a step, by name."""
    x, c = (t.detach().requires_grad_() for t in (x, c))
    model.zero_grad()
    out = model(x, c)
    out.square().mean().backward()
    gradients = {name.removeprefix("block."): p.grad for name, p in model.named_parameters()}
    return {"output": out.detach(), "x": x.grad, "c": c.grad, **gradients}


def error(found: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> float:
    worst = 0.0
    for name, reference in exact.items():
        value = found[name]
        if reference is None or float(reference.abs().max()) < 1e-9:
            continue
        if value is None:
            return float("inf")
        worst = max(worst, float((value.double() - reference).abs().max() / reference.abs().max()))
    return worst


def levels(runs: int, batch: int, shares: Sequence[float]) -> None:
    print(f"\nBatch {batch}:\n")
    print("| level | zero rows | way | kept, MiB | peak, MiB | time, ratio | error, ratio | lost gradients |")
    print("|---|---|---|---|---|---|---|---|")
    for channels, side in LEVELS:
        torch.manual_seed(0)
        plain = Level(channels)
        x = torch.randn(batch, channels, side, side)
        for share in shares:
            c = torch.randn(batch, 512)
            c[: round(share * batch)] = 0
            models = {way: arranged(plain, way) for way in WAYS}
            exact = step(copy.deepcopy(plain).double(), x.double(), c.double())
            results = {way: step(model, x, c) for way, model in models.items()}
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(runs):
                for way, model in models.items():
                    began = time.perf_counter()
                    step(model, x, c)
                    times[way].append(time.perf_counter() - began)
            own = error(results["dense"], exact)
            for way, model in models.items():
                report = memopt.profile(model, (x, c), loss=lambda y: y.square().mean(), real=True)
                start = sum(report.start_by_category.values())
                lost = sum(results[way][n] is None for n, g in results["dense"].items() if g is not None)
                ratio = statistics.median(times[way]) / statistics.median(times["dense"])
                print(
                    f"| {side}x{side}, C={channels} | {share:.0%} | {way} | {report.kept / MIB:.1f} "
                    f"| {(report.peak - start) / MIB:.1f} | {ratio:.2f} | {error(results[way], exact) / own:.2g} "
                    f"| {lost} |",
                    flush=True,
                )


def quickstart(runs: int) -> None:
    """Times of whole training steps of the small model, one tenth of the conditions dropped."""
    recipe = load_recipe(ROOT / "examples" / "hae_v2")
    config: Any = recipe.presets["quickstart"]
    torch.manual_seed(0)
    plain = recipe.model(config)
    ways: dict[str, list[Any]] = {
        "dense": [],
        "sparse": [OuterProduct(mode="sparse")],
        "rank_one": ["outer_product"],
        "rank_one + fused_attention": ["outer_product", "fused_attention"],
    }
    models = {name: copy.deepcopy(plain) for name in ways}
    for name, passes in ways.items():
        memopt.apply(models[name], passes)
    n, size = 16, config.image_size
    x, t, y = torch.randn(n, 4, size, size), torch.randint(0, 1000, (n,)), torch.arange(n) % 2
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, model in models.items():
            model.zero_grad()
            began = time.perf_counter()
            model(x, t, y, null=torch.arange(n) < 2, clf_free=True).square().mean().backward()
            times[name].append(time.perf_counter() - began)
    print("\n| quickstart, batch 16, a step | time, ratio |\n|---|---|")
    for name in ways:
        print(f"| {name} | {statistics.median(times[name]) / statistics.median(times['dense']):.2f} |", flush=True)


def whole(batch: int = 14) -> None:
    """A training step of brats128 on a GPU, by fake profiles."""
    from bench.claims import step as whole_step

    print("\n| brats128, batch 14, for a GPU | peak, GiB | ratio | kept, GiB |")
    print("|---|---|---|---|")
    rows: list[tuple[str, list[Any], Any]] = [
        ("dense", [], None),
        ("published, 10% of the rows zero", [], 1),
        ("published, all rows zero", [], batch),
        ("fused_attention alone", ["fused_attention"], None),
        ("rank_one, any share", ["outer_product"], None),
        ("rank_one + fused_attention", ["outer_product", "fused_attention"], None),
    ]
    plain = 0
    for name, passes, zeros in rows:
        report = whole_step(batch, passes=passes, outer=None if zeros is None else _Known(zeros))
        plain = plain or report.peak
        print(f"| {name} | {report.peak / GIB:.2f} | {report.peak / plain:.3f} | {report.kept / GIB:.2f} |", flush=True)


class _Known:
    """The published computation where it is known how many rows are zero: fake tensors have no values to ask."""

    def __init__(self, zeros: int) -> None:
        self.zeros = zeros

    def __call__(self, c: Tensor) -> Tensor | None:
        if self.zeros == c.shape[0]:
            return None
        rows = torch.arange(self.zeros, c.shape[0])
        whole = torch.zeros(*c.shape, c.shape[1], dtype=c.dtype)
        whole[rows] = torch.einsum("ab,ac->abc", c[rows], c[rows])
        return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="attention blocks without zero rows only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{datetime.date.today()}; 4 heads, D = 512, float32"
    )
    if options.quick:
        levels(2, 4, (0.0,))
        return
    levels(5, 10, SHARES)
    levels(9, 4, (0.0,))
    quickstart(15)
    whole()


if __name__ == "__main__":
    main()
