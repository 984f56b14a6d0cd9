"""A small UNet in the manner of guided-diffusion, its home-made checkpointing included.

`CheckpointFunction` has the defects of its model: the second forward runs with whatever random and autocast state
backward happens to meet, its inputs live on `ctx` instead of among the saved tensors, and a second backward finds them
gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def checkpoint(func: Callable, inputs: Sequence[Tensor], params: Iterable[nn.Parameter], flag: bool):
    """Run `func(*inputs)`; with `flag`, drop what lies between and compute it again in backward."""
    if not flag:
        return func(*inputs)
    return CheckpointFunction.apply(func, len(inputs), *inputs, *params)


class CheckpointFunction(torch.autograd.Function):
    """The legacy way to recompute: restores neither random numbers nor autocast, allows one backward only."""

    @staticmethod
    def forward(ctx, func, count, *tensors):
        ctx.func = func
        ctx.inputs, ctx.params = list(tensors[:count]), list(tensors[count:])
        with torch.no_grad():
            return func(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        detached = [tensor.detach().requires_grad_(True) for tensor in ctx.inputs]
        with torch.enable_grad():
            # Views, so that a func which starts with an in-place operation does not write into a leaf.
            outputs = ctx.func(*[tensor.view_as(tensor) for tensor in detached])
        found = torch.autograd.grad(outputs, detached + ctx.params, grads, allow_unused=True)
        del ctx.inputs, ctx.params, outputs
        return (None, None, *found)


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_module(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in the dtype of its own weights, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def normalization(channels: int) -> nn.Module:
    return GroupNorm32(4, channels)


class TimestepBlock(nn.Module):
    """A module whose forward also takes the timestep embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the embedding to those children which want one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TimestepBlock):
    def __init__(self, channels: int, emb_channels: int, dropout: float, out_channels: int, use_checkpoint: bool):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Attention over a [N, heads * 3 * width, T] tensor, split by heads first."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, channels, length = qkv.shape
        width = channels // (3 * self.n_heads)
        q, k, v = qkv.reshape(batch * self.n_heads, 3 * width, length).split(width, dim=1)
        scale = width**-0.25
        scores = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weights = torch.softmax(scores.float() if scores.dtype != torch.float64 else scores, dim=-1).to(scores.dtype)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(num_heads)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), True)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(flat))))
        return (flat + h).reshape(x.shape)


class UNetModel(nn.Module):
    """The UNet: `input_blocks`, `middle_block`, `output_blocks`, skips taken from a list by `pop`."""

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 16,
        out_channels: int = 6,
        num_res_blocks: int = 1,
        attention_resolutions: Sequence[int] = (2,),
        dropout: float = 0.1,
        channel_mult: Sequence[int] = (1, 2),
        num_classes: int | None = 5,
        use_checkpoint: bool = False,
        num_heads: int = 2,
    ):
        super().__init__()
        self.model_channels = model_channels
        self.num_classes = num_classes
        width = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, width)

        def res(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, width, dropout, out, use_checkpoint)

        ch = channel_mult[0] * model_channels
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skips, ds = [ch], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    layers.append(AttentionBlock(ch, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch)))
                skips.append(ch)
                ds *= 2

        self.middle_block = TimestepEmbedSequential(res(ch, ch), AttentionBlock(ch, num_heads), res(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    layers.append(AttentionBlock(ch, num_heads))
                if level and i == num_res_blocks:
                    layers.append(Upsample(ch))
                    ds //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(normalization(ch), nn.SiLU(), zero_module(nn.Conv2d(ch, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("pass y if and only if the model is class-conditional")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for module in self.input_blocks:
            h = module(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)
