"""What recomputation costs and saves on HAE V2: the memory of fake profiles, and the time of true steps on the CPU.

    python bench/recompute.py            # about ten minutes on two cores; --memory alone: three
    python bench/recompute.py --memory

Memory is one float32 training step of `brats128` with AdamW at batch 14, as a GPU would allocate it (bench/claims.py).
Times are of forward and backward of `quickstart` at batch 16 and `brats128` at batch 1: medians of ratios to the plain
model within a round, in which each row runs once, so that what else the machine does concerns all rows alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memopt
from bench.claims import GIB, ROOT, step
from memopt.passes import (
    AMP,
    BlockSwap,
    Checkpoint,
    LeanOps,
    OffloadActivations,
    OffloadSkips,
    Optimizer8bit,
    OptimizerInBackward,
    OuterProduct,
)
from memopt.recipe import load_recipe

OUTER = [OuterProduct()]
THREE = [*OUTER, Checkpoint(), LeanOps()]
ALL = [*THREE, OffloadSkips(prefetch=0), OffloadActivations(prefetch=0), AMP(), Optimizer8bit()]
ROWS: dict[str, list[Any]] = {
    "none": [],
    "outer_product": OUTER,
    "outer_product, lean_ops": [*OUTER, LeanOps()],
    "outer_product, checkpoint cheap": [*OUTER, Checkpoint(policy="cheap")],
    "outer_product, checkpoint cheap, lean_ops": [*OUTER, Checkpoint(policy="cheap"), LeanOps()],
    "outer_product, checkpoint full": [*OUTER, Checkpoint()],
    "outer_product, checkpoint full, lean_ops": [*OUTER, Checkpoint(), LeanOps()],
}
"""What is timed, too."""
MORE: dict[str, list[Any]] = {
    "lean_ops": [LeanOps()],
    "outer_product, checkpoint full, layer": [*OUTER, Checkpoint(granularity="layer")],
    "outer_product, checkpoint full, nested": [*OUTER, Checkpoint(granularity="nested")],
    "outer_product, checkpoint cheap, layer": [*OUTER, Checkpoint(policy="cheap", granularity="layer")],
    "the three, offload_activations": [*THREE, OffloadActivations()],
    "the three, offload_skips, offload_activations": [*THREE, OffloadSkips(), OffloadActivations()],
    "those, amp bf16": [*THREE, OffloadSkips(), OffloadActivations(), AMP()],
    "those, optimizer_8bit": [*THREE, OffloadSkips(), OffloadActivations(), AMP(), Optimizer8bit()],
    "the same, nothing fetched ahead": [*ALL],
    "those, optimizer_in_backward": [*ALL, OptimizerInBackward()],
    "those, block_swap": [*ALL, OptimizerInBackward(), BlockSwap()],
}


def steps(preset: str, batch: int) -> dict[str, Callable[[], None]]:
    """For each row a function that runs forward and backward once."""
    recipe = load_recipe(ROOT / "examples" / "hae_v2")
    config: Any = recipe.presets[preset]
    size = config.image_size

    def made(passes: list[Any]) -> Callable[[], None]:
        torch.manual_seed(0)
        model: Any = recipe.model(config).train()
        x, t = torch.randn(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        kwargs = {"y": torch.zeros(batch, dtype=torch.long), "clf_free": True, "null": torch.zeros(batch).bool()}
        if passes:
            memopt.apply(model, passes)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(x, t, **kwargs).square().mean().backward()

        return run

    return {name: made(passes) for name, passes in ROWS.items()}


def ratios(preset: str, batch: int, rounds: int) -> dict[str, float]:
    """The median of each row's time over the plain model's in the same round."""
    runs = steps(preset, batch)
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        seconds = {}
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - begin
        for name, one in seconds.items():
            found[name].append(one / seconds["none"])
    return {name: statistics.median(ratio) for name, ratio in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="no times")
    parser.add_argument("--times", action="store_true", help="no memory")
    parser.add_argument("--rounds", type=int, default=7, help="how often each row is timed")
    args = parser.parse_args()
    small = {} if args.memory else ratios("quickstart", 16, args.rounds)
    large = {} if args.memory else ratios("brats128", 1, args.rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if args.times:
        for name in ROWS:
            print(f"| {name} | {small[name]:.2f} | {large[name]:.2f} |")
        return
    print("| passes | kept, GiB | peak, GiB | of plain | time, quickstart | time, brats128 |")
    print("|---|---|---|---|---|---|")
    plain = 0
    for name, passes in (ROWS | MORE).items():
        report = step(14, passes=passes)
        plain = plain or report.peak
        times = " | ".join(f"{found[name]:.2f}" if name in found else "" for found in (small, large))
        print(
            f"| {name} | {report.kept / GIB:.2f} | {report.peak / GIB:.2f} | {report.peak / plain:.3f} | {times} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
