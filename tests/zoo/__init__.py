"""The models that every pass is tested on: small, random, and between them nasty in most ways that models are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import guided, library, nasty
from .probe import Same, differences, fingerprint, leaves, loss_of, placed, reseeded, run

__all__ = [
    "ZOO",
    "Case",
    "Same",
    "differences",
    "fingerprint",
    "guided",
    "leaves",
    "loss_of",
    "nasty",
    "placed",
    "reseeded",
    "run",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model of the zoo: how to build it, what to call it with, and what is special about it."""

    name: str
    build: Callable[[], nn.Module]
    """Makes a new instance, always with the same weights; leaves the global random state alone."""
    inputs: Callable[[], Inputs]
    """Makes new (args, kwargs), always with the same values."""
    blocks: bool
    """Whether the model has repeated blocks that a checkpointing pass can wrap."""
    notes: str = ""

    def __str__(self) -> str:
        return self.name


ZOO: dict[str, Case] = {}


class Draw:
    """Random inputs, the same on each use."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1234)

    def normal(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=self.generator).requires_grad_(grad)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)


def add(
    name: str, make: Callable[[], nn.Module], inputs: Callable[[Draw], Inputs], blocks: bool = True, notes: str = ""
) -> None:
    seed = 100 + len(ZOO)
    ZOO[name] = Case(name, lambda: reseeded(seed, make), lambda: inputs(Draw()), blocks, notes)


def hae_v2() -> nn.Module:
    from examples.hae_v2.model import HAEUNetModelV2

    return HAEUNetModelV2(
        image_size=16,
        in_channels=4,
        model_channels=32,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        dropout=0.1,
        channel_mult=(1, 2),
        num_classes=2,
        num_heads=2,
    )


def tokens(draw: Draw) -> Inputs:
    return (draw.normal(2, 9, 7, grad=True),), {}


def frozen_tokens(draw: Draw) -> Inputs:
    return (draw.normal(2, 9, 7),), {}


def nested(draw: Draw) -> Inputs:
    meta = {"mask": (draw.normal(2, 9, 1) > -1).float(), "ids": draw.ids(4, 2)}
    batch = {"image": draw.normal(2, 9, 7, grad=True), "meta": meta}
    return (batch,), {"options": {"scale": 0.5, "bias": draw.normal(nasty.WIDTH, grad=True)}}


def flux_inputs(draw: Draw) -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return (), {
        "hidden_states": draw.normal(2, 15, 4, grad=True),
        "encoder_hidden_states": draw.normal(2, 7, 12, grad=True),
        "pooled_projections": draw.normal(2, 10),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 1.0]),
    }


add(
    "hae_v2",
    hae_v2,
    lambda d: ((d.normal(2, 4, 16, 16, grad=True), d.ids(1000, 2)), {"y": torch.tensor([0, 1]), "threshold": 0.5}),
)
add(
    "guided_unet",
    guided.UNetModel,
    lambda d: ((d.normal(2, 3, 6, 10, grad=True), d.ids(1000, 2)), {"y": d.ids(5, 2)}),
    notes="attention always runs through the legacy CheckpointFunction",
)
add(
    "guided_unet_legacy",
    lambda: guided.UNetModel(use_checkpoint=True, dropout=0.0),
    lambda d: ((d.normal(2, 3, 6, 10, grad=True), d.ids(1000, 2)), {"y": d.ids(5, 2)}),
    notes="all blocks run through the legacy CheckpointFunction; no dropout, which would make its gradients wrong",
)
add(
    "unet2d",
    library.unet2d,
    lambda d: ((d.normal(2, 3, 6, 10, grad=True), d.ids(1000, 2)), {"class_labels": d.ids(4, 2)}),
)
add(
    "unet2d_condition",
    library.unet2d_condition,
    lambda d: (
        (d.normal(2, 4, 7, 9, grad=True), d.ids(1000, 2)),
        {"encoder_hidden_states": d.normal(2, 5, 12, grad=True), "return_dict": False},
    ),
)
add(
    "dit",
    library.dit,
    lambda d: ((d.normal(2, 4, 8, 8, grad=True),), {"timestep": d.ids(1000, 2), "class_labels": d.ids(10, 2)}),
    notes="drops labels at random inside the blocks",
)
add(
    "pixart",
    library.pixart,
    lambda d: (
        (d.normal(2, 4, 6, 10, grad=True),),
        {
            "encoder_hidden_states": d.normal(2, 5, 12, grad=True),
            "timestep": d.ids(1000, 2),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        },
    ),
)
add(
    "sd3",
    library.sd3,
    lambda d: (
        (d.normal(2, 4, 6, 10, grad=True),),
        {
            "encoder_hidden_states": d.normal(2, 5, 12, grad=True),
            "pooled_projections": d.normal(2, 10, grad=True),
            "timestep": d.ids(1000, 2),
        },
    ),
    notes="blocks take and return two streams; the last one returns None for the context",
)
add("flux", library.flux, flux_inputs, notes="two lists of blocks, each with a tuple of rotary tables as an argument")
add(
    "autoencoder_kl",
    library.autoencoder,
    lambda d: ((d.normal(2, 3, 9, 11, grad=True),), {"sample_posterior": True}),
    notes="draws the latent from the global generator, outside all blocks; in float64 it draws other numbers",
)
add(
    "monai_diffusion_unet",
    library.monai_unet,
    lambda d: (
        (d.normal(2, 2, 6, 10, grad=True), d.ids(1000, 2)),
        {"context": d.normal(2, 5, 6, grad=True), "class_labels": d.ids(4, 2)},
    ),
)
add("vit", library.vit, lambda d: ((d.normal(2, 3, 12, 12, grad=True),), {}))
add(
    "gpt2",
    library.gpt2,
    lambda d: (
        (d.ids(61, 2, 11),),
        {"attention_mask": torch.tensor([[1] * 11, [1] * 8 + [0] * 3]), "use_cache": False},
    ),
    notes="tied embedding; with use_cache=True the blocks would append to a cache, twice if they run twice",
)
add("tied_weights", nasty.TiedWeights, lambda d: ((d.ids(17, 2, 9),), {}))
add("nested_io", nasty.NestedIO, nested)
add("shared_called", nasty.SharedCalled, tokens)
add("shared_listed", nasty.SharedListed, tokens)
add(
    "batch_norm",
    nasty.BatchNormNet,
    lambda d: ((d.normal(2, 3, 5, 7, grad=True),), {}),
    notes="a second forward of a block updates its buffers again; the output in train mode does not depend on them",
)
add(
    "running_stats",
    nasty.RunningStats,
    tokens,
    notes="a second forward of a block updates its buffers again and gives another output",
)
add(
    "power_iteration",
    nasty.PowerIteration,
    tokens,
    notes="a second forward of a block updates its buffer again and gives another output",
)
add("inplace_input", nasty.InplaceInput, tokens, notes="a second forward of a block on the same tensor is wrong")
add("inplace_relu", nasty.InplaceReLU, tokens)
add("data_dependent", nasty.DataDependent, tokens, notes="one block stays unused: its gradients are None")
add("frozen_stem", nasty.FrozenStem, frozen_tokens, notes="neither the input nor the first layers take a gradient")
add(
    "generator_dropout",
    nasty.GeneratorDropout,
    tokens,
    notes="a second forward of a block draws another mask, whatever the global random state",
)
add("single_linear", nasty.SingleLinear, tokens, blocks=False, notes="the root is the only module")
add("tuple_blocks", nasty.TupleBlocks, tokens)
add("own_autocast", nasty.OwnAutocast, tokens, notes="the loss is computed from bfloat16")
