"""What recomputation costs and saves on HAE V2: the memory of fake profiles, and the time of true steps on the CPU.

    python bench/recompute.py            # about fifteen minutes on two cores; --memory alone: three
    python bench/recompute.py --memory

Memory is one float32 training step of `brats128` with AdamW at batch 14, as a GPU would allocate it (bench/claims.py).
Times are of forward and backward of `quickstart` at batches of 16 and 64 and of `brats128` at batch 1: medians of
ratios to the plain model within a round, in which each row runs once, so that what else the machine does concerns all
rows alike.
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
TIMED = (("quickstart", 16), ("quickstart", 64), ("brats128", 1))
BLIND = "none; attention without the condition's tokens"
"""Another model, which shows how much of the time the product and what attention makes of it take."""
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

    def made(passes: list[Any], tokens: bool = True) -> Callable[[], None]:
        torch.manual_seed(0)
        model: Any = recipe.model(config).train()
        if not tokens:
            for block in model.modules():
                if type(block).__name__ == "AttentionBlock":
                    block.forward = lambda x, tokens=None, forward=block.forward: forward(x)
        x, t = torch.randn(batch, 4, size, size), torch.zeros(batch, dtype=torch.long)
        kwargs = {"y": torch.zeros(batch, dtype=torch.long), "clf_free": True, "null": torch.zeros(batch).bool()}
        if passes:
            memopt.apply(model, passes)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(x, t, **kwargs).square().mean().backward()

        return run

    return {name: made(passes) for name, passes in ROWS.items()} | {BLIND: made([], tokens=False)}


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
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if not args.memory:
        found = [ratios(preset, batch, args.rounds) for preset, batch in TIMED]
        print(f"| passes | {' | '.join(f'{preset}, batch {batch}' for preset, batch in TIMED)} |")
        print("|---|---|---|---|")
        for name in found[0]:
            print(f"| {name} | {' | '.join(f'{times[name]:.2f}' for times in found)} |")
    if args.times:
        return
    print("\n| passes | kept, GiB | peak, GiB | of plain |\n|---|---|---|---|")
    plain = 0
    for name, passes in (ROWS | MORE).items():
        report = step(14, passes=passes)
        plain = plain or report.peak
        figures = f"{report.kept / GIB:.2f} | {report.peak / GIB:.2f} | {report.peak / plain:.3f}"
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
