"""Passes beside each other: the models on which tests try them, what some training steps compute, and their peak.

A pass that is bitwise exact must change no bit beside any others, so what a set of passes computes is compared with
what its *rest* computes, those of the set that round or are not exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import memopt
from memopt import Pass
from memopt.conflicts import Conflict, between
from memopt.registry import STAGES, Claim, Context, available_passes, resolve
from tests.zoo import ZOO, Inputs, differences, fingerprint, loss_of, reseeded

OPTIONS: dict[str, dict[str, Any]] = {
    "offload_activations": {"min_bytes": 1},  # small models have small tensors
    "offload_skips": {"min_bytes": 1, "waits": 8},  # and short ways
    "lean_ops": {"min_bytes": 1},
    "grad_accumulation": {"parts": 2},
}
"""What a pass needs here other than its defaults."""

PASSES: dict[str, Pass] = {
    name: resolve({name: OPTIONS.get(name, {})})[0]
    for name, cls in available_passes().items()
    if cls.__module__.startswith("memopt.passes.")
}


def in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """The order in which passes that are given like this are applied."""
    return tuple(sorted(names, key=lambda name: STAGES.index(PASSES[name].stage)))


@dataclass(frozen=True)
class Steps:
    """What training steps computed, by the names of what each value is."""

    losses: list[Tensor] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    """Weights and buffers at the end."""

    def values(self) -> dict[str, Tensor]:
        """All of it in one table."""
        found = {f"loss of step {i}": loss for i, loss in enumerate(self.losses)}
        for i, grads in enumerate(self.grads):
            found |= {f"gradient of {name} in step {i}": grad for name, grad in grads.items()}
        return found | self.state


@dataclass(frozen=True)
class Subject:
    """A model on which passes are tried. What was found about a set of passes is kept."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.build()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    @functools.cached_property
    def claims(self) -> dict[str, list[Claim]]:
        """What each pass would change."""
        model, optimizer = self.fresh()
        return {name: pass_.plan(model, Context(optimizers=(optimizer,))) for name, pass_ in PASSES.items()}

    @functools.cached_property
    def conflicts(self) -> dict[tuple[str, ...], Conflict]:
        """Pairs that ``apply`` refuses, in the order of application."""
        pairs = {in_order(names) for names in itertools.permutations(PASSES, 2)}
        met = {(a, b): between(PASSES[a], self.claims[a], PASSES[b], self.claims[b]) for a, b in pairs}
        return {names: conflict for names, conflict in met.items() if conflict is not None}

    @functools.lru_cache  # noqa: B019 - subjects live as long as the tests
    def results(self, names: tuple[str, ...]) -> Steps:
        """What two training steps compute with these passes; undoing them must leave no trace."""
        model, optimizer = self.fresh()
        before = fingerprint(model), optimizer_print(optimizer)
        memopt.apply(model, [PASSES[name] for name in names], optimizer=optimizer).undo()
        assert differences(before[0], fingerprint(model)) == []
        assert before[1] == optimizer_print(optimizer)

        found = Steps()
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p, n=n: found.grads[-1].update({n: p.grad.clone()}))
            for n, parameter in model.named_parameters()
        ]
        with memopt.apply(model, [PASSES[name] for name in names], optimizer=optimizer):
            for seed in range(2):
                args, kwargs = self.inputs()
                torch.manual_seed(seed)
                found.grads.append({})
                loss = loss_of(model(*args, **kwargs))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.losses.append(loss.detach().clone())
            found.state.update({key: value.clone() for key, value in model.state_dict().items()})
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(value, found.state[key]) for key, value in model.state_dict().items())
        assert traces(before[0]) == traces(fingerprint(model))
        assert [type(m) for m in model.modules()] == [type(m) for m in self.build().modules()]
        return found

    @functools.lru_cache  # noqa: B019
    def peak(self, names: tuple[str, ...], stepping: bool) -> int:
        """Bytes at the peak of a training step on a GPU, of a batch whose activations are more than the weights.

        ``stepping``: the optimizer is part of it, which costs a third of the time.
        """
        model, optimizer = self.fresh()
        report = memopt.profile(
            model,
            tree_map_only(Tensor, larger, self.inputs()),
            loss=loss_of,
            optimizer=optimizer if stepping else None,
            passes=[PASSES[name] for name in names],
            device="cuda",
        )
        return report.peak

    def about(self, names: tuple[str, ...], *aspects: str) -> list[str]:
        """Those that change one of these aspects."""
        return [name for name in names if any(claim.aspect in aspects for claim in self.claims[name])]


def larger(tensor: Tensor, times: int = 16) -> Tensor:
    """So many times the batch."""
    return tensor.detach().repeat(times, *[1] * (tensor.dim() - 1)).requires_grad_(tensor.requires_grad)


def traces(print_of: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What attributes there are, whatever their values."""
    return {path: sorted(own) for path, own in print_of.items()}


def optimizer_print(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """The class of an optimizer, the attributes it has, its hooks, options and states."""
    own = vars(optimizer)
    hooks = {name: len(value) for name, value in own.items() if name.endswith("_hooks")}
    groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
    return type(optimizer), sorted(own), hooks, groups, len(optimizer.state)


def hae() -> nn.Module:
    """HAE V2 as in the preset `quickstart`, but of one level, half as wide."""
    from examples.hae_v2.model import HAEUNetModelV2

    return HAEUNetModelV2(
        image_size=8,
        in_channels=4,
        model_channels=32,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(1,),
        dropout=0.0,
        channel_mult=(1,),
        num_classes=2,
    )


def hae_inputs() -> Inputs:
    image = torch.linspace(-2, 2, 2 * 4 * 8 * 8).sin().reshape(2, 4, 8, 8)
    return (image, torch.tensor([3, 700])), {"y": torch.tensor([0, 1]), "threshold": 0.5}


def monai_unet() -> nn.Module:
    """MONAI's diffusion UNet of one level, which writes its attention out."""
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=1,
        channels=(8,),
        attention_levels=(True,),
        norm_num_groups=4,
        num_head_channels=4,
        with_conditioning=True,
        cross_attention_dim=6,
    )


def monai_inputs() -> Inputs:
    """A batch of four: of two, a sample could not be told from a channel."""
    (image, steps), kwargs = ZOO["monai_diffusion_unet"].inputs()
    return (larger(image, 2), larger(steps, 2)), {"context": larger(kwargs["context"], 2)}


HAE = Subject("hae_v2", lambda: reseeded(0, hae), hae_inputs)
MONAI = Subject("monai_unet", lambda: reseeded(1, monai_unet), monai_inputs)
GPT2 = Subject("gpt2", ZOO["gpt2"].build, ZOO["gpt2"].inputs)
SUBJECTS = [HAE, MONAI, *(Subject(n, ZOO[n].build, ZOO[n].inputs) for n in ("unet2d", "dit")), GPT2]
