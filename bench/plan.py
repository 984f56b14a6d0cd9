"""Plans against what people do by hand: memory and time of true training steps on the CPU, at the same budgets.

    python bench/plan.py                    # all models, about half an hour on two cores
    python bench/plan.py gpt2 dit           # some of them
    python bench/plan.py --memory           # no times: budgets, predictions and true peaks alone
    python bench/plan.py hae_brats128       # 13 GiB and minutes a step; no times

For each model and budget (shares of the plain peak) the plan's predicted and true peak, the largest error of a gradient
against the plain model's, and its time. Peers are checkpoints around every block, around every second and third, the
model's own gradient checkpointing, and torch's ``activation_memory_budget`` (a compiled graph's partition into forward
and backward; the graph is then run operation by operation, without a code generator); each counts at the budgets that
its true peak fits. Times are medians of ratios to the plain step within a round, in which each row runs three
steps, the fastest of which counts.

Rockmate is no peer here: rkgb 2.0.0, which Rockmate 2.0.0 imports, lacks its modules in the package index; 1.0.1 loads,
but measures memory on CUDA devices alone and solves by Gurobi.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memopt
from memopt.errors import DoesNotFit
from memopt.passes import Checkpoint
from memopt.planning import Plan, search
from memopt.planning.plans import describe

SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)
TORCH_BUDGETS = (1.0, 0.5, 0.25)
"""Shares of the activations that torch's own planner is told to keep."""
ROUNDS = 3
STEPS = 3
"""Of each row in a round."""


@dataclass
class Subject:
    """A model, what it is called with, and how its own checkpointing is turned on."""

    model: nn.Module
    inputs: dict[str, Any]
    own: Callable[[], Callable[[], object]] | None = None
    """Turns it on, and returns what turns it off."""
    large: bool = False
    """Whether a step takes minutes: no times, and gradients are compared on the first example alone."""


def hae(preset: str = "quickstart", batch: int = 16, size: int = 32) -> Subject:
    from memopt.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parent.parent / "examples" / "hae_v2")
    model = recipe.model(recipe.presets[preset])
    inputs = {
        "x": torch.randn(batch, 4, size, size),
        "timesteps": torch.randint(1000, (batch,)),
        "y": torch.randint(2, (batch,)),
        "null": torch.rand(batch) < 0.1,
        "clf_free": True,
    }
    return Subject(model, inputs, large=size > 32)


def guided() -> Subject:
    from tests.zoo.scaled import SCALED

    model = SCALED["guided_unet"].build()
    args, kwargs = SCALED["guided_unet"].inputs()
    return Subject(model, {**dict(zip(("x", "timesteps", "y"), args, strict=False)), **kwargs})


def unet2d_condition() -> Subject:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=2, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(8, 4, 32, 32),
        "timestep": torch.randint(1000, (8,)),
        "encoder_hidden_states": torch.randn(8, 16, 64),
    }
    return Subject(model, inputs, _diffusers(model))


def dit() -> Subject:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=48, num_layers=10, sample_size=32, in_channels=4, out_channels=4
    )
    inputs = {
        "hidden_states": torch.randn(8, 4, 32, 32),
        "timestep": torch.randint(1000, (8,)),
        "class_labels": torch.randint(1000, (8,)),
    }
    return Subject(model, inputs, _diffusers(model))


def gpt2() -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=10, n_embd=192, n_head=4, vocab_size=1000, n_positions=256, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(1000, (8, 256))

    def own() -> Callable[[], object]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.gradient_checkpointing_disable

    return Subject(model, {"input_ids": tokens, "labels": tokens}, own)


def _diffusers(model: Any) -> Callable[[], Callable[[], object]]:
    def own() -> Callable[[], object]:
        model.enable_gradient_checkpointing()
        return model.disable_gradient_checkpointing  # type: ignore[no-any-return]

    return own


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "hae_quickstart": hae,
    "hae_brats128": lambda: hae("brats128", 14, 128),
    "guided": guided,
    "unet2d_condition": unet2d_condition,
    "dit": dit,
    "gpt2": gpt2,
}


class Rows:
    """The ways to run one model's step."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.optimizer = torch.optim.AdamW(subject.model.parameters(), lr=0.0)
        subject.model.train()

    def on(self, passes: Any) -> Callable[[], object]:
        """Put passes, a plan or the model's own checkpointing on; returns what takes it off."""
        if passes == "own":
            assert self.subject.own is not None
            return self.subject.own()
        handle = memopt.apply(self.subject.model, passes, optimizer=self.optimizer)
        return handle.undo

    def step(self, call: Callable[..., Any] | None = None, examples: int | None = None) -> torch.Tensor:
        """Forward and backward."""
        torch.manual_seed(0)
        inputs = {k: v[:examples] if isinstance(v, torch.Tensor) else v for k, v in self.subject.inputs.items()}
        loss = memopt.memory.profiler.default_loss((self.subject.model if call is None else call)(**inputs))
        loss.backward()
        return loss.detach()

    def peak(self, passes: Any) -> int:
        """Bytes of a true step."""
        off = self.on(passes)
        try:
            found = memopt.profile(self.subject.model, self.subject.inputs, optimizer=self.optimizer, real=True)
        finally:
            off()
        return found.peak

    def gradients(self, passes: Any) -> list[torch.Tensor]:
        """Of a true step."""
        off = self.on(passes)
        examples = 1 if self.subject.large else None
        try:
            self.step(examples=examples)
            self.subject.model.zero_grad()
            self.step(examples=examples)
            return [p.grad.clone() for p in self.subject.model.parameters() if p.grad is not None]
        finally:
            self.subject.model.zero_grad()
            off()

    def compiled(self, budget: float, base: int) -> tuple[int, float]:
        """Peak in bytes and time against plain of torch's own planner; ``base`` is what a step begins with."""
        import torch._functorch.config as config

        torch._dynamo.reset()
        with config.patch(activation_memory_budget=budget):
            call = torch.compile(self.subject.model, backend="aot_eager_decomp_partition")
            self.step(call)
        self.subject.model.zero_grad()
        peak = base + self.allocated(call)
        ratios = []
        for _ in range(ROUNDS):
            seconds = [self.seconds(each) for each in (self.subject.model, call)]
            ratios.append(seconds[1] / seconds[0])
        torch._dynamo.reset()
        return peak, statistics.median(ratios)

    def allocated(self, call: Callable[..., Any]) -> int:
        """The most bytes that forward and backward have at once, by the allocator's own account."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step(call)
        self.subject.model.zero_grad()
        events = seen.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(itertools.accumulate(change for _, change in changes))

    def seconds(self, call: Callable[..., Any] | None = None) -> float:
        """Of the fastest of a few steps: what else the machine does makes steps slower, never faster."""
        found = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self.step(call)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(time.perf_counter() - began)
        return min(found)

    def times(self, rows: dict[str, Any]) -> dict[str, float]:
        """Ratios to the first row."""
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for turn in range(ROUNDS + 1):
            for name, passes in rows.items():
                off = self.on(passes)
                if turn == 0 or isinstance(passes, Plan):
                    self.step()  # a pass learns in its first call
                    self.subject.model.zero_grad()
                if turn:
                    seconds[name].append(self.seconds())
                off()
        first = next(iter(seconds.values()))
        return {n: statistics.median(a / b for a, b in zip(s, first, strict=True)) for n, s in seconds.items()}


def measure(name: str, timed: bool) -> None:
    """Print the rows of one model."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    timed = timed and not subject.large
    rows = Rows(subject)
    began = time.perf_counter()
    found = search(subject.model, subject.inputs, optimizer=rows.optimizer)
    plain = rows.peak([])
    print(f"\n{name}: plain {plain / 2**20:.1f} MiB, {len(found.blocks)} blocks", flush=True)
    plans: dict[float, Plan] = {}
    for share in SHARES:
        try:
            plans[share] = found.plan(int(share * plain))
        except DoesNotFit as error:
            print(f"  {share:.0%}: {str(error).partition(', with')[0]}")
    times = [plan.seconds for plan in plans.values()]
    assert times == sorted(times), f"{name}: a plan for less is faster than one for more"
    print(f"  planned in {time.perf_counter() - began:.0f} s, {found.profiles} profiles")
    blocks = found.blocks
    peers: dict[str, Any] = {f"every {k}": [Checkpoint(blocks=tuple(blocks[::k]))] for k in (1, 2, 3)}
    if subject.own is not None:
        peers["own"] = "own"
    peaks = {peer: rows.peak(passes) for peer, passes in peers.items()} if timed else {}
    budgets = {}
    if timed:
        base = plain - rows.allocated(subject.model)
        budgets = {f"torch's budget {b}": rows.compiled(b, base) for b in TORCH_BUDGETS}
    peaks |= {peer: peak for peer, (peak, _) in budgets.items()}
    reference = rows.gradients([])
    ratios = rows.times({"plain": [], **{str(s): p for s, p in plans.items()}, **peers}) if timed else {}
    ratios |= {peer: ratio for peer, (_, ratio) in budgets.items()}
    for share, plan in plans.items():
        real = rows.peak(plan)
        error = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
            for a, b in zip(rows.gradients(plan), reference, strict=True)
        )
        fitting = {peer: ratios[peer] for peer in peaks if timed and peaks[peer] <= share * plain}
        best = min(fitting.items(), key=lambda item: item[1]) if fitting else ("none fits", float("nan"))
        assert real <= share * plain, f"{name} at {share:.0%}: {real} bytes are above the budget"
        print(
            f"  {share:.0%}: predicted {plan.peak / plain:.3f}, true {real / plain:.3f}, gradients {error:.0e}, "
            f"estimated time {plan.seconds / plan.plain_seconds:.3f}"
            + (f", measured {ratios[str(share)]:.2f}; best peer {best[0]} {best[1]:.2f}" if timed else "")
            + f"; {'; '.join(map(describe, plan.passes)) or 'none'}",
            flush=True,
        )
    for peer, size in peaks.items():
        print(f"  {peer}: peak {size / plain:.3f}" + (f", time {ratios[peer]:.2f}" if timed else ""))


def hundred() -> None:
    """Print how long a plan for 100 blocks takes."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True) for _ in range(100)])
    x, optimizer = torch.randn(8, 64, 64), torch.optim.AdamW(model.parameters())
    began = time.perf_counter()
    found = search(model, x, optimizer=optimizer, hardware="a100")
    plain = found.plain().peak
    for share in (0.75, 0.5):
        plan = found.plan(int(share * plain))
        seconds = time.perf_counter() - began
        print(f"100 blocks at {share:.0%}: {seconds:.0f} s, {found.profiles} profiles, peak {plan.peak / plain:.3f}")
        began = time.perf_counter()


def main() -> None:
    """Measure the models that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SUBJECTS)
    parser.add_argument("models", nargs="*", help=f"of {names}, hundred; default: all but hae_brats128")
    parser.add_argument("--memory", action="store_true", help="no times and no peers")
    options = parser.parse_args()
    for name in options.models or [*(name for name in SUBJECTS if name != "hae_brats128"), "hundred"]:
        if name == "hundred":
            hundred()
        else:
            measure(name, not options.memory)


if __name__ == "__main__":
    main()
