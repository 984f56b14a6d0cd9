"""What the optimizer passes do to a training: its loss, the bytes of the states, the time of a step.

    python bench/optimizers.py              # prints the table of docs/benchmarks.md, some minutes on 2 cores
    python bench/optimizers.py --steps 20 --rows optimizer_in_backward fused_optimizer
    python bench/optimizers.py --memory     # brats128 on a GPU instead, by fake profiles: some minutes on one core

The preset `quickstart` of HAE V2 as `memopt train` runs it (AdamW, simulated data, which is made if `data/` has none),
once for each row, all from the same weights, batches and draws. Their steps take turns, so that the ratio of medians of
whole steps means something on a busy machine. The loss is the mean over the last tenth of the steps. Bytes are those
that the optimizer's states have on the device between steps. On a CPU the device is the host: what
`offload_optimizer` moves stays in the same memory.

With ``--memory`` nothing is trained: a float32 step of `brats128` is profiled as bench/claims.py does it. "After
backward" is the most that the optimizer's own phase needs, weights and states among it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.claims import GIB, ROOT, step
from memopt.memory import MemoryReport
from memopt.recipe import load_recipe
from memopt.training import Trainer

SETS: dict[str, tuple[str, ...]] = {
    "plain AdamW": (),
    "optimizer_8bit": ("optimizer_8bit",),
    "optimizer_in_backward": ("optimizer_in_backward",),
    "optimizer_8bit + optimizer_in_backward": ("optimizer_8bit", "optimizer_in_backward"),
    "offload_optimizer": ("offload_optimizer",),
    "fused_optimizer": ("fused_optimizer",),
}
TOGETHER = ("offload_optimizer", "optimizer_in_backward")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states that are on the device."""
    tensors = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of(report: MemoryReport, phase: str) -> int:
    """The most bytes on the device in a phase of the step."""
    timeline = report.timeline
    _, first, end = next(one for one in timeline.phases if one[0] == phase)
    moments = list(zip(timeline.ops, map(sum, zip(*timeline.bytes.values(), strict=True)), strict=True))
    begins = [size for op, size in moments if op < first][-1]
    return max([begins, *(size for op, size in moments if first <= op < end)])


def print_memory(batches: list[int]) -> None:
    """The second table of docs/benchmarks.md."""
    print(f"torch {torch.__version__}; brats128, one float32 training step with AdamW, device cuda, sizes in GiB\n")
    print("| batch | passes | peak | after backward | states between steps |")
    print("|---|---|---|---|---|")
    for batch in batches:
        for name, passes in [*SETS.items(), (" + ".join(TOGETHER), TOGETHER)]:
            report = step(batch, passes=passes)
            sizes = report.peak, peak_of(report, "optimizer"), report.start_by_category["optimizer_states"]
            print(f"| {batch} | {name} | {' | '.join(f'{size / GIB:.2f}' for size in sizes)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--rows", nargs="+", choices=list(SETS)[1:], default=list(SETS)[1:], help="besides the plain one"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "data")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        print_memory([1, 14])
        return
    recipe = load_recipe(ROOT / "examples" / "hae_v2")
    config = dataclasses.replace(
        recipe.presets["quickstart"], steps=options.steps, batch_size=options.batch, ema_decay=None
    )
    trainers = {
        name: Trainer(
            recipe, dataclasses.replace(config, passes=(*config.passes, *passes)), data=None, cache=options.cache
        )
        for name, passes in SETS.items()
        if name in ("plain AdamW", *options.rows)
    }
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for data in trainers["plain AdamW"].loader(range(options.steps)):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            losses[name].append(trainer.train_step(data).item())
            times[name].append(time.perf_counter() - began)
    model = trainers["plain AdamW"].model
    count = sum(p.numel() for p in model.parameters())
    last = max(1, options.steps // 10)
    plain = statistics.mean(losses["plain AdamW"][-last:])
    pace = statistics.median(times["plain AdamW"])
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads; "
        f"HAE V2 quickstart, {count:,} parameters, {options.steps} steps of {options.batch} samples, loss over the "
        f"last {last}, a plain step {1000 * pace:.0f} ms\n"
    )
    print("| passes | loss | change | state bytes per parameter | time of a step |")
    print("|---|---|---|---|---|")
    for name, trainer in trainers.items():
        loss = statistics.mean(losses[name][-last:])
        print(
            f"| {name} | {loss:.5f} | {loss / plain - 1:+.2%} | {state_bytes(trainer.optimizer) / count:.2f} "
            f"| {statistics.median(times[name]) / pace:.2f} |"
        )


if __name__ == "__main__":
    main()
