"""What the first passes save and cost: bytes kept for backward, and time of a training step relative to plain.

    python bench/first_passes.py            # prints the table of docs/benchmarks.md, a few minutes on 2 cores
    python bench/first_passes.py --quick    # the small models only

Bytes are exact: distinct storages that autograd keeps at the end of forward, parameters apart. Times are medians of
interleaved runs of forward, loss and backward, as a ratio to the plain model in the same process.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import memopt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SETS: dict[str, list[Any]] = {
    "plain": [],
    "checkpoint": ["checkpoint"],
    "amp bf16": ["amp"],
    "checkpoint + amp bf16": ["checkpoint", "amp"],
}


def kept_bytes(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = forward(model)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    return total


def hae(preset: str, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from memopt.recipe import load_recipe

    recipe = load_recipe(Path(__file__).resolve().parent.parent / "examples" / "hae_v2")
    config = recipe.presets[preset]
    size = config.image_size
    x, t = torch.randn(batch, 4, size, size), torch.randint(1000, (batch,))
    y, null = torch.randint(2, (batch,)), torch.rand(batch) < 0.1
    model = recipe.model(config)
    return model, lambda m: m(x, t, y=y, clf_free=True, null=null).square().mean()


def unet(batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    x, t = torch.randn(batch, 3, 32, 32), torch.randint(1000, (batch,))
    return model, lambda m: m(x, t).sample.square().mean()


def measure(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]], runs: int
) -> dict[str, tuple[int, float]]:
    plain, forward = make()
    models = {name: copy.deepcopy(plain) for name in SETS}
    for name, passes in SETS.items():
        memopt.apply(models[name], passes)
        forward(models[name]).backward()  # first calls learn
    kept = {name: kept_bytes(model, forward) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SETS}
    for _ in range(runs):
        for name, model in models.items():
            start = time.perf_counter()
            forward(model).backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: (kept[name], statistics.median(seconds[name])) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small models only")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    models: dict[str, tuple[Callable[[], Any], int]] = {
        "HAE V2 quickstart, batch 16": (lambda: hae("quickstart", 16), 7),
        "diffusers UNet2DModel 32x32, batch 8": (lambda: unet(8), 7),
    }
    if not quick:
        models["HAE V2 brats128, batch 1"] = (lambda: hae("brats128", 1), 3)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}\n"
    )
    print("| model | passes | kept for backward, MiB | ratio | time of a step, ratio |\n|---|---|---|---|---|")
    for name, (make, runs) in models.items():
        rows = measure(make, runs)
        bytes_plain, time_plain = rows["plain"]
        for passes, (kept, seconds) in rows.items():
            print(
                f"| {name} | {passes} | {kept / 2**20:.1f} | {kept / bytes_plain:.2f} | {seconds / time_plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
