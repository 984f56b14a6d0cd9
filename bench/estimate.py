"""How right memory estimates are: fake tensors, true tensors, torch's MemTracker and the allocator on the same step.

    python bench/estimate.py            # prints the tables of docs/benchmarks.md, a few minutes on 2 cores
    python bench/estimate.py --quick    # without brats128

A step is forward, backward and AdamW's. The estimate is made on fake tensors; "counted" is the same count on true ones;
the allocator's figure comes from torch.profiler on a plain step and has the scratch of operators in it, which the next
columns name. Times are medians of interleaved runs, as a ratio to the plain step in the same process.

On a machine with CUDA: estimates made on the CPU for CUDA, against CUDA's allocator.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memopt
from memopt.memory.tracker import Tracker
from tests.zoo import Case, loss_of
from tests.zoo.scaled import SCALED, for_a_gpu, recipe
from tests.zoo.witness import Step, on_cuda

MIB = 2**20


def named(scratch: Mapping[str, int]) -> str:
    """The two operators with the most scratch."""
    return ", ".join(f"{op.removeprefix('aten.')} {size / MIB:.1f}" for op, size in list(scratch.items())[:2])


def row(case: Case) -> str:
    model, inputs = case.build(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    how = {"train": True, "loss": loss_of, "optimizer": optimizer}
    fake = memopt.profile(model, inputs, **how)
    real = memopt.profile(model, inputs, real=True, **how)
    step = Step(model, inputs, **how)
    account = step.allocator()
    try:
        other = f"{step.mem_tracker() / MIB:.2f}"
    except AssertionError:  # it wants a graph of each input of a module that needs a gradient
        other = "fails"
    assert abs(account.start + account.tensors - real.peak) < 2048, (case, account, real.peak)
    return (
        f"| {case} | {fake.peak / MIB:.2f} | {real.peak / MIB:.2f}{' =' if fake.peak == real.peak else ''} | {other} | "
        f"{account.peak / MIB:.2f} | {100 * (fake.peak / account.peak - 1):+.2f} | "
        f"{account.scratch_at_peak / MIB:.1f} | {named(account.scratch)} | {fake.seconds:.1f} |"
    )


def overhead(case: Case, runs: int) -> tuple[float, float]:
    """Time of a tracked step and of a plain one, seconds."""
    model, inputs = case.build(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(model, inputs, train=True, optimizer=optimizer)
    step.prepare()
    plain: list[float] = []
    tracked: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        plain.append(time.perf_counter() - start)
        tracker = Tracker(model)
        start = time.perf_counter()
        with tracker, tracker.phase("forward"):  # the phase in which it looks closest
            tracker.own_model()
            tracker.own_states(optimizer)
            step()
        tracked.append(time.perf_counter() - start)
    return statistics.median(tracked), statistics.median(plain)


def on_the_cpu(quick: bool) -> None:
    brats128 = recipe("brats128", 1)
    print(
        "| model | estimate, MiB | counted, MiB | MemTracker, MiB | allocator, MiB | estimate to allocator, % | "
        "scratch at the peak, MiB | most scratch of one call, MiB | time of the estimate, s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for case in [*SCALED.values(), recipe("quickstart", 16), *([] if quick else [brats128])]:
        print(row(case), flush=True)
        gc.collect()
    if not quick:
        tracked, plain = overhead(brats128, 5)
        print(
            f"\nA tracked step of {brats128} takes {tracked / plain:.2f} times as long as a plain one ({plain:.1f} s)."
        )


def on_the_gpu() -> None:
    print(
        "| model | step | estimate, MiB | max_memory_allocated, MiB | requested, MiB | held by libraries, MiB | "
        "estimate to allocated less held, % | scratch at the peak, MiB | estimate to that less scratch, % | "
        "most scratch of one call, MiB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for case in for_a_gpu():
        for train in (True, False):
            predicted, account, peak, requested = on_cuda(case.build(), case.inputs(), train=train)
            gc.collect()
            torch.cuda.empty_cache()
            print(
                f"| {case} | {'train' if train else 'inference'} | {predicted.peak / MIB:.1f} | {peak / MIB:.1f} | "
                f"{requested / MIB:.1f} | {account.library / MIB:.1f} | "
                f"{100 * (predicted.peak / (peak - account.library) - 1):+.2f} | "
                f"{account.scratch_at_peak / MIB:.1f} | "
                f"{100 * (predicted.peak / (account.start + account.tensors) - 1):+.2f} | {named(account.scratch)} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without brats128")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}\n"
    )
    if torch.cuda.is_available():
        on_the_gpu()
    else:
        on_the_cpu(quick)


if __name__ == "__main__":
    main()
