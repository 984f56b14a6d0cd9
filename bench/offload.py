"""Weights, activations and skip connections off the device: memopt beside torch, accelerate and diffusers.

    python bench/offload.py            # prints the tables of docs/benchmarks.md, a quarter of an hour on 2 cores
    python bench/offload.py --small    # smaller models and fewer runs, two minutes

Four tables, each on the same model for all methods: weights in a file (bench/offload_weights.py; process memory, as
psutil sees it), weights on the device, training, and the full HAE V2. Bytes for a GPU come from fake profiles and are
exact; times are medians of interleaved runs on this machine, as a ratio to the plain model's. Where host and device are
the same memory, moving weights or activations costs copies and can save nothing: these times say what the bookkeeping
and the copies cost, not what a GPU would see.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import logging
import platform
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memopt
from bench import offload_weights as weights
from bench.claims import step as full_step
from memopt.memory import MemoryReport
from memopt.memory.ledger import moved, off_the_books
from memopt.passes import BlockSwap, OffloadActivations, OffloadSkips

MIB, GIB = 1 << 20, 1 << 30
BEGAN = time.perf_counter()


def progress(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:4.0f} s] {text}", file=sys.stderr, flush=True)


def interleaved(what: str, steps: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each step; the runs take turns, the first of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        progress(f"{what}: run {run} of {runs} of {len(steps)} methods")
        for name in [*steps][run % len(steps) :] + [*steps][: run % len(steps)]:
            began = time.perf_counter()
            steps[name]()
            if run:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


class Ready(nn.Module):
    """A model with the inputs of a step: its output is one tensor."""

    def __init__(self, model: nn.Module, **inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        """Given to the model whenever it is called."""

    def forward(self, **inputs: Any) -> Tensor:
        out: Any = self.model(**inputs)
        tensor: Tensor = out if isinstance(out, Tensor) else out.sample
        return tensor

    def step(self) -> Tensor:
        """Forward and backward."""
        self.zero_grad()
        out: Tensor = self(**self.inputs)
        out.square().mean().backward()
        return out.detach()

    def infer(self) -> Tensor:
        with torch.no_grad():
            out: Tensor = self(**self.inputs)
        return out

    def profile(self, passes: Sequence[Any] = (), *, train: bool) -> MemoryReport:
        """Of a step on a GPU."""
        loss = (lambda y: y.square().mean()) if train else None
        return memopt.profile(self, self.inputs, train=train, loss=loss, passes=passes, device="cuda", rounding=1)


def dit(small: bool) -> Ready:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4 if small else 8,
        attention_head_dim=64,
        in_channels=4,
        num_layers=6 if small else 12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    for parameter in model.parameters():  # half of them are zero at first, and so would be the output
        nn.init.normal_(parameter, std=0.02)
    return Ready(
        model, hidden_states=torch.randn(1, 4, 32, 32), timestep=torch.tensor([10]), class_labels=torch.tensor([1])
    )


def unet(small: bool) -> Ready:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    batch = 2 if small else 8
    inputs = {"sample": torch.randn(batch, 4, 32, 32), "encoder_hidden_states": torch.randn(batch, 16, 64)}
    return Ready(model, timestep=torch.tensor([10]), **inputs)


def encoder(small: bool) -> Ready:
    sizes = weights.Sizes(width=256, blocks=4 if small else 8, tokens=256)
    tokens = torch.randint(sizes.vocabulary, (4 if small else 8, sizes.tokens))
    return Ready(weights.Encoder(sizes), tokens=tokens)


# --- weights on the device ----------------------------------------------------------------------------------------


class Groups:
    """Counts the weights of diffusers' groups from when they are brought in until they are let go."""

    def __init__(self) -> None:
        self.on: dict[int, int] = {}
        """Bytes by parameter."""
        self.all: dict[int, int] = {}
        self.most = 0

    def brought(self, group: Any) -> None:
        self.on.update(self._of(group))
        self.most = max(self.most, sum(self.on.values()))

    def gone(self, group: Any) -> None:
        self.all.update(self._of(group))
        for key in self._of(group):
            self.on.pop(key, None)

    def _of(self, group: Any) -> dict[int, int]:
        found = [*group.parameters, *(p for module in group.modules for p in module.parameters())]
        return {id(p): p.nbytes for p in found}


@contextlib.contextmanager
def counted_groups() -> Iterator[Groups]:
    from diffusers.hooks.group_offloading import ModuleGroup

    groups, before = Groups(), (ModuleGroup.onload_, ModuleGroup.offload_)

    def onload(group: Any) -> None:
        before[0](group)
        groups.brought(group)

    def offload(group: Any) -> None:
        groups.gone(group)
        before[1](group)

    ModuleGroup.onload_, ModuleGroup.offload_ = onload, offload
    try:
        yield groups
    finally:
        ModuleGroup.onload_, ModuleGroup.offload_ = before


def grouped(model: nn.Module, level: str, folder: Path | None = None) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        num_blocks_per_group=1,
        offload_to_disk_path=None if folder is None else str(folder),
    )


def on_device(small: bool, runs: int) -> None:
    torch.manual_seed(0)
    plain = dit(small)
    total = sum(p.nbytes for p in plain.parameters())
    rows: dict[str, tuple[Ready, int]] = {"plain": (plain, total)}
    options: dict[str, dict[str, Any]] = {
        "memopt BlockSwap, resident 1, prefetch 0": {"resident": 1, "prefetch": 0},
        "memopt BlockSwap, resident 1, prefetch 1": {"resident": 1, "prefetch": 1},
        "memopt BlockSwap, resident 2, prefetch 1": {"resident": 2, "prefetch": 1},
        "memopt BlockSwap, leaf level, 1 and 0": {"level": "leaf", "prefetch": 0},
        "memopt BlockSwap, leaf level, 1 and 1": {"level": "leaf"},
        "memopt BlockSwap, disk, 1 and 1": {"to": "disk"},
        "memopt BlockSwap, disk, leaf level, 1 and 1": {"to": "disk", "level": "leaf"},
    }
    for name, how in options.items():
        progress(f"on the device: {name}")
        swap = BlockSwap(**how)
        found = max(plain.profile([swap], train=False).timeline.bytes["parameters"])
        model = copy.deepcopy(plain)
        memopt.apply(model, [swap])
        rows[name] = model, found
    with weights.folder() as home:
        for disk in (False, True):
            for level in ("block_level", "leaf_level"):
                name = f"diffusers group offloading, {level}" + (", disk" if disk else "")
                progress(f"on the device: {name}")
                model = copy.deepcopy(plain)
                with counted_groups() as groups:
                    grouped(model.model, level, home / level if disk else None)
                    model.infer()
                rows[name] = model, groups.most + total - sum(groups.all.values())
        seconds = interleaved("on the device", {name: model.infer for name, (model, _) in rows.items()}, runs)
        expected = plain.infer()
        print(
            f"\ndiffusers DiTTransformer2DModel, {total / MIB:.1f} MiB of weights in {6 if small else 12} blocks, "
            f"inference at batch 1; median of {runs}. Resident weights of memopt: fake profile for a GPU; of "
            "diffusers: its own groups between onload_ and offload_ and what is in none. Without a disk its groups "
            "stay where they are on a CPU, so that its time says nothing:\n\n"
            "| method | resident weights, MiB | ratio | forward, ratio | output |\n|---|---|---|---|---|"
        )
        for name, (model, found) in rows.items():
            ratio = f"{seconds[name] / seconds['plain']:.2f}"
            if name.startswith("diffusers") and not name.endswith("disk"):
                ratio = "nothing moves"
            print(
                f"| {name} | {found / MIB:.1f} | {found / total:.3f} | {ratio} | {_equal(model.infer(), expected)} |",
                flush=True,
            )


def _equal(found: Tensor, expected: Tensor) -> str:
    if torch.equal(found, expected):
        return "bitwise equal"
    wrong = float((found - expected).abs().max() / expected.abs().max())
    return f"DIFFERS by {wrong:.2g} of the largest" if wrong == wrong else "DIFFERS: NaN"


# --- training -----------------------------------------------------------------------------------------------------


class Hooked(Ready):
    """A model below saved-tensor hooks."""

    def __init__(self, inner: Ready, hooks: Callable[[], Any]) -> None:
        super().__init__(inner.model, **inner.inputs)
        self.hooks = hooks

    def forward(self, **inputs: Any) -> Tensor:
        with self.hooks():
            return super().forward(**inputs)


class SaveOnGPU(saved_tensors_hooks):
    """What save_on_cpu does on a GPU, on fake tensors of a machine without one: there ``.cpu()`` would do nothing."""

    def __init__(self) -> None:
        super().__init__(self._pack, Tensor.clone)

    @staticmethod
    def _pack(tensor: Tensor) -> Tensor:
        with off_the_books():
            away = tensor.detach().clone()
        moved(away, "cpu")
        return away


def gradients(model: nn.Module, expected: dict[str, Tensor]) -> str:
    """What became of them, against a plain step's."""
    kinds: Counter[str] = Counter()
    worst = 0.0
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name not in expected:
            continue
        if grad is None or grad.device.type == "meta":
            kinds["NONE"] += 1
        elif bool(grad.isnan().any()):
            kinds["NaN"] += 1
        elif torch.equal(grad, expected[name]):
            kinds["bitwise equal"] += 1
        else:
            kinds["DIFFERENT"] += 1
            most = max(float(other.abs().max()) for other in expected.values())
            worst = max(worst, float((grad - expected[name]).abs().max()) / most)
    if set(kinds) == {"bitwise equal"}:
        return "bitwise equal"
    text = f"of {len(expected)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{text}, by {worst:.1g} of the largest" if kinds["DIFFERENT"] else text


def attempt(model: Ready, expected: dict[str, Tensor]) -> str:
    """A step of a method that is not made for training."""
    try:
        model.step()
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return gradients(model, expected)


def training(title: str, plain: Ready, runs: int) -> None:
    from accelerate import cpu_offload

    together = ["checkpoint", OffloadActivations(), OffloadSkips(), BlockSwap()]
    sets: dict[str, list[Any]] = {
        "memopt offload_activations": [OffloadActivations()],
        "memopt offload_activations, disk": [OffloadActivations(to="disk")],
        "memopt offload_skips": [OffloadSkips()],
        "memopt block_swap": [BlockSwap()],
        "memopt checkpoint": ["checkpoint"],
        "memopt checkpoint + offload_activations": together[:2],
        "memopt checkpoint + offload_activations + offload_skips + block_swap": together,
    }
    models = {"plain": plain, "torch save_on_cpu": Hooked(copy.deepcopy(plain), lambda: save_on_cpu(pin_memory=True))}
    reports = {
        "plain": plain.profile(train=True),
        "torch save_on_cpu": Hooked(plain, SaveOnGPU).profile(train=True),
    }
    for name, passes in sets.items():
        progress(f"training, {title}: {name}")
        models[name] = copy.deepcopy(plain)
        memopt.apply(models[name], passes)
        reports[name] = plain.profile(passes, train=True)
    seconds = interleaved(f"training, {title}", {name: model.step for name, model in models.items()}, runs)
    plain.step()
    expected = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    print(
        f"\n{title}, a training step without an optimizer's; median of {runs}:\n\n"
        "| method | kept on a GPU, MiB | peak on a GPU, MiB | ratio | off the GPU, MiB | step, ratio | gradients |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, model in models.items():
        model.step()
        report = reports[name]
        print(
            f"| {name} | {report.kept / MIB:.1f} | {report.peak / MIB:.1f} "
            f"| {report.peak / reports['plain'].peak:.3f} | {sum(report.off_device.values()) / MIB:.1f} "
            f"| {seconds[name] / seconds['plain']:.2f} | {gradients(model, expected)} |",
            flush=True,
        )
    with weights.folder() as home:
        offloaded, groups, disk = (copy.deepcopy(plain) for _ in range(3))
        cpu_offload(offloaded.model, execution_device=torch.device("cpu"))
        grouped(groups.model, "block_level")
        grouped(disk.model, "block_level", home)
        for name, model in {
            "accelerate cpu_offload": offloaded,
            "diffusers group offloading, which moves nothing on a CPU": groups,
            "diffusers group offloading, disk": disk,
        }.items():
            progress(f"training, {title}: {name}")
            print(f"| {name} | – | – | – | – | – | {attempt(model, expected)} |", flush=True)


# --- the full model -----------------------------------------------------------------------------------------------


def whole(small: bool) -> None:
    chain = ["outer_product", "checkpoint", "offload_skips", "offload_activations", "block_swap"]
    trained = [chain[:n] for n in (0, 2, 3, 4, 5)]
    rows: list[tuple[bool, list[str]]] = [(True, passes) for passes in trained] + [(False, []), (False, chain[2:3])]
    if small:
        rows = [rows[0], rows[4]]
    print(
        "\nHAE V2 `brats128`, batch 14, for a GPU; training steps with AdamW, and inference:\n\n"
        "| step | passes | peak, GiB | ratio | kept, GiB | off the GPU, GiB |\n|---|---|---|---|---|---|"
    )
    plain: dict[bool, int] = {}
    for train, passes in rows:
        progress(f"brats128: {'train' if train else 'inference'}, {' + '.join(passes) or 'plain'}")
        report = full_step(14, passes=passes, train=train)
        whole_peak = plain.setdefault(train, report.peak)
        print(
            f"| {'train' if train else 'inference'} | {' + '.join(passes) or 'plain'} | {report.peak / GIB:.3f} "
            f"| {report.peak / whole_peak:.3f} | {report.kept / GIB:.3f} "
            f"| {sum(report.off_device.values()) / GIB:.3f} |",
            flush=True,
        )


TABLES = ("weights", "device", "training", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="smaller models and fewer runs")
    parser.add_argument("--only", choices=TABLES, nargs="+", default=TABLES, help="some of the tables")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; several wait for one another long where others compute, too"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small, runs = options.small, 2 if options.small else 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written is removed
    warnings.filterwarnings("ignore", module="diffusers|accelerate")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("accelerate", "diffusers"))
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {versions}, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        flush=True,
    )
    try:
        if "weights" in options.only:
            weights.table(small, runs, progress)
        if "device" in options.only:
            on_device(small, 2 * runs + 1)
        if "training" in options.only:
            torch.manual_seed(0)
            training("The same encoder, smaller", encoder(small), runs)
            training("diffusers UNet2DConditionModel", unet(small), runs)
        if "whole" in options.only:
            whole(small)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
