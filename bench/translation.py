"""Memory, time and error of the passes that apply to a translation's model call.

    python bench/translation.py --memory     # brats128, a batch of 20 slices, profiled for CUDA: 1 minute
    python bench/translation.py --times      # quickstart, true calls on this machine, interleaved: 3 minutes

A batch of 20 slices is a call on 40: each once as healthy and once without a condition.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memopt
from examples.hae_v2.recipe import HAE
from memopt.recipe import parse_passes

ROWS = (
    "",
    "inference_mode",
    "outer_product",
    "fused_attention",
    "offload_skips",
    "release",
    "block_swap",
    "grad_accumulation:parts=4",
    "outer_product,inference_mode",
    "outer_product,offload_skips,block_swap",
    "outer_product,inference_mode,grad_accumulation:parts=4",
    "amp",
    "outer_product,inference_mode,amp",
    "outer_product,inference_mode,grad_accumulation:parts=4,amp",
    "outer_product,inference_mode,grad_accumulation:parts=4,amp,block_swap",
)


def build(preset: str) -> torch.nn.Module:
    torch.manual_seed(0)
    recipe = HAE()
    model = recipe.model(recipe.presets[preset]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised ones would hide every error
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def inputs(preset: str, slices: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size, n = HAE().presets[preset].image_size, 2 * slices
    x = torch.randn(slices, 4, size, size, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    zeros = torch.zeros(n, dtype=torch.long)
    return (x, zeros + 300, zeros), {"null": torch.arange(n) >= slices, "clf_free": True}


def peak(passes: str, slices: int) -> int:
    """Bytes at the peak of a call of the full model, as on a GPU."""
    model = build("brats128")
    memopt.apply(model, parse_passes(tuple(filter(None, passes.split(",")))))
    return memopt.profile(model, inputs("brats128", slices), train=False, device="cuda").peak


def memory() -> None:
    plain = {slices: peak("", slices) for slices in (10, 20)}
    print(f"plain, batch 10: {plain[10] / 2**30:.2f} GiB; all rows: batch 20\n")
    print(f"{'passes':<72} {'GiB':>6} {'of plain':>9} {'of plain at 10':>15}")
    for row in ROWS:
        found = peak(row, 20) if row else plain[20]
        print(
            f"{row or 'none':<72} {found / 2**30:6.2f} {found / plain[20]:9.3f} {found / plain[10]:15.3f}", flush=True
        )


def times(slices: int = 20, rounds: int = 7) -> None:
    args, kwargs = inputs("quickstart", slices)
    model = build("quickstart")
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    errors: dict[str, float] = {}
    with torch.no_grad():
        reference = build("quickstart").double()(args[0].double(), *args[1:], **kwargs)
        for _ in range(rounds):
            for row in ROWS:
                with memopt.apply(model, parse_passes(tuple(filter(None, row.split(","))))):
                    model(*args, **kwargs)
                    begin = time.perf_counter()
                    found = model(*args, **kwargs)
                    seconds[row].append(time.perf_counter() - begin)
                errors[row] = float((found.double() - reference).abs().max())
    plain = statistics.median(seconds[""])
    print(f"plain: {plain:.3f} s per call on {2 * slices}; {torch.get_num_threads()} threads\n")
    print(f"{'passes':<72} {'time':>6} {'error against float64':>22}")
    for row in ROWS:
        print(f"{row or 'none':<72} {statistics.median(seconds[row]) / plain:6.2f} {errors[row]:22.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    if options.memory or not options.times:
        memory()
    if options.times or not options.memory:
        times()


if __name__ == "__main__":
    main()
