"""Building blocks of the HAE V2 UNet: residual, attention and hybrid CNN/transformer blocks.

Shapes in the docstrings: N samples, C channels, T = H * W positions, E the width of the time and class embedding,
D extra attention tokens (D = E), n transformer tokens.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DENSE_TOKENS = 64  # up to this many tokens the transformer attends to all of them
QUERY_BLOCKS = 32  # above it, the sequence is cut into about this many blocks
KEPT_KEYS = 0.1  # and each block of queries attends to this share of the blocks of keys


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps [N] as float32 [N, dim]: dim / 2 cosines, then as many sines."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(module: nn.Module) -> nn.Module:
    """Set the module's parameters to zero, so that its residual branch starts as nothing, and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in at least float32 whatever the input's dtype; the output has the input's."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return normed.to(x.dtype)


class Recomputable(nn.Module):
    """A block that drops its activations and recomputes them in the backward pass while `use_checkpoint` is set."""

    def __init__(self, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint

    def _run(self, compute: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            out: Tensor = checkpoint(compute, *args, use_reentrant=False)
            return out
        return compute(*args)


class TimestepBlock(Recomputable):
    """A block called with the embedding besides its input: forward(x [N, C, H, W], emb [N, E])."""


class TimestepEmbedSequential(nn.Sequential):
    """Layers in order; the embedding goes to those that take it and the condition's tokens to attention."""

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, AttentionBlock):
                x = layer(x, tokens)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour x2, then (with `use_conv`) a 3x3 convolution: [N, C, H, W] -> [N, C_out, 2H, 2W]."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Downsample(nn.Module):
    """Half the size, by a stride-2 convolution or by means: [N, C, H, W] -> [N, C_out, H / 2, W / 2]."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.op: nn.Module = nn.AvgPool2d(2)
        if use_conv:
            self.op = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class ResBlock(TimestepBlock):
    """Two normalised convolutions with the embedding between them, and a skip: [N, C, H, W] -> [N, C_out, H', W'].

    The embedding is added to the first convolution's output or, with `use_scale_shift_norm`, scales and shifts what
    the second norm gives. `up` and `down` change the size (H' = 2H, H / 2), before the first convolution and on the
    skip.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        up: bool = False,
        down: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(use_checkpoint)
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module | None = None
        if up or down:
            self.resample = Upsample(channels, use_conv=False) if up else Downsample(channels, use_conv=False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._run(self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample is None:
            h = self.in_layers(x)
        else:
            h = self.in_layers[-1](self.resample(self.in_layers[:-1](x)))
            x = self.resample(x)
        added = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = added.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        out: Tensor = self.skip_connection(x) + h
        return out


def split_heads(x: Tensor, parts: int, heads: int, parts_first: bool) -> Sequence[Tensor]:
    """Cut the channels of x [N, parts * C, L] into parts of [N * heads, C / heads, L].

    The channels are laid out by head and then by part or, with `parts_first`, by part and then by head.
    """
    n, width, length = x.shape
    size = width // (parts * heads)
    if parts_first:
        return [part.reshape(n * heads, size, length) for part in x.chunk(parts, dim=1)]
    return x.reshape(n * heads, parts * size, length).chunk(parts, dim=1)


class AttentionBlock(Recomputable):
    """Self-attention over the positions of a feature map, with a residual: [N, C, H, W] -> [N, C, H, W].

    With `encoder_channels` = E a tensor [N, E, D] comes along, whose D columns `encoder_kv` turns into D more keys and
    values, placed before the T spatial ones. The weights are explicit: [N * heads, T, D + T], softmax in float32.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        encoder_channels: int | None = None,
        use_new_attention_order: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(use_checkpoint)
        self.num_heads = num_heads
        self.use_new_attention_order = use_new_attention_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = None if encoder_channels is None else nn.Conv1d(encoder_channels, 2 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self._run(self._forward, x, tokens)

    def _forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        n, channels, *size = x.shape
        flat = x.reshape(n, channels, -1)
        q, k, v = split_heads(self.qkv(self.norm(flat)), 3, self.num_heads, self.use_new_attention_order)
        if self.encoder_kv is not None and tokens is not None:
            more = split_heads(self.encoder_kv(tokens), 2, self.num_heads, self.use_new_attention_order)
            k, v = torch.cat([more[0], k], dim=-1), torch.cat([more[1], v], dim=-1)
        # Scaling both factors rather than their product keeps the logits inside float16's range.
        scale = (channels // self.num_heads) ** -0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = torch.softmax(weight, dim=-1, dtype=wide).to(v.dtype)
        mixed = torch.einsum("bts,bcs->bct", weight, v).reshape(n, channels, -1)
        out: Tensor = flat + self.proj_out(mixed)
        return out.reshape(n, channels, *size)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def sparse_pattern(n: int) -> tuple[int, int, tuple[int, ...]]:
    """Which key blocks each query block of an n-token sequence attends to.

    Fixed for each length and drawn from a generator of its own, so that two evaluations, a recomputation and a later
    process agree.

    Returns:
        Tokens in a block, number of blocks, and the query blocks' lists of key blocks one after the other, each as
        long as the others, in rising order, holding the block's own number and others by chance.
    """
    return _draw_pattern(n)


@functools.lru_cache(maxsize=256)
def _draw_pattern(n: int) -> tuple[int, int, tuple[int, ...]]:
    block = math.ceil(n / QUERY_BLOCKS)
    blocks = math.ceil(n / block)
    attended = max(1, round(KEPT_KEYS * blocks))
    generator = random.Random(n)
    pattern: list[int] = []
    for own in range(blocks):
        others = [other for other in range(blocks) if other != own]
        # Not sample(): only the numbers that random() gives are promised to be the same in every Python version.
        chosen = [others.pop(int(generator.random() * len(others))) for _ in range(attended - 1)]
        pattern += sorted([own, *chosen])
    return block, blocks, tuple(pattern)


class SparseSelfAttention(nn.MultiheadAttention):
    """Self-attention [N, n, C] -> [N, n, C]: dense up to 64 tokens, block-sparse with 10% of the keys above.

    The key and value blocks that a block of queries attends to are gathered and go through one fused attention call, so
    time and memory fall with the sparsity and nothing of size n x n exists. Only the parameters are the parent's.
    """

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__(channels, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        n, length, channels = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        attend = self._dense if length <= DENSE_TOKENS else self._sparse
        mixed = attend(qkv).transpose(1, 2).reshape(n, -1, channels)[:, :length]
        return F.linear(mixed, self.out_proj.weight, self.out_proj.bias)

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        """[N, n, 3C] -> queries, keys and values [N, heads, n, C / heads]."""
        n, length, _ = qkv.shape
        return [part.reshape(n, length, self.num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]

    def _dense(self, qkv: Tensor) -> Tensor:
        q, k, v = self._heads(qkv)
        return F.scaled_dot_product_attention(q, k, v)

    def _sparse(self, qkv: Tensor) -> Tensor:
        n, length, _ = qkv.shape
        block, blocks, pattern = sparse_pattern(length)
        keys = block * len(pattern) // blocks
        # A tensor made here and not a buffer: the state dict keeps its names, and tracing sees a constant.
        index = torch.tensor(pattern, device=qkv.device)
        padding = blocks * block - length
        q, k, v = (
            part.reshape(n, self.num_heads, blocks, block, -1)
            for part in self._heads(F.pad(qkv, (0, 0, 0, padding)) if padding else qkv)
        )

        def gather(x: Tensor) -> Tensor:
            """[N, heads, blocks, block, d] -> what each query block attends to, [N, heads * blocks, keys, d]."""
            return x.index_select(2, index).reshape(n, self.num_heads * blocks, keys, -1)

        mask = None
        if padding:
            real = torch.arange(blocks * block, device=qkv.device).reshape(blocks, block) < length
            seen = real.index_select(0, index).reshape(1, blocks, 1, keys)
            mask = seen.repeat(1, self.num_heads, 1, 1)
        mixed = F.scaled_dot_product_attention(q.flatten(1, 2), gather(k), gather(v), attn_mask=mask)
        return mixed.reshape(n, self.num_heads, blocks * block, -1)


class BottleneckMLP(nn.Module):
    """Linear -> GELU -> dropout -> linear through a narrow middle: [..., C] -> [..., C]."""

    def __init__(self, channels: int, bottleneck_ratio: float = 0.25, dropout: float = 0.1) -> None:
        super().__init__()
        width = int(channels * bottleneck_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class MultiScaleSparseTransformerBlockV2(nn.Module):
    """One transformer layer over patches of several sizes, fused: [N, C, H, W] -> [N, C, H, W].

    The tokens of a scale are the means of its patches; the scales share the norms and the MLP, not the attention.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        patch_sizes: Sequence[int] = (1, 4, 8),
        bottleneck_ratio: float = 0.25,
    ) -> None:
        super().__init__()
        self.patch_sizes = tuple(patch_sizes)
        self.attentions = nn.ModuleList(SparseSelfAttention(channels, num_heads) for _ in self.patch_sizes)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = BottleneckMLP(channels, bottleneck_ratio, dropout)
        self.scale_fusion = nn.Linear(len(self.patch_sizes) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        scales = [
            self._scale(x, patch, attend) for patch, attend in zip(self.patch_sizes, self.attentions, strict=True)
        ]
        fused: Tensor = self.scale_fusion(torch.cat(scales, dim=1).movedim(1, -1))
        return fused.movedim(-1, 1)

    def _scale(self, x: Tensor, patch: int, attend: nn.Module) -> Tensor:
        height, width = x.shape[-2:]
        grid = x
        if patch > 1:
            grid = F.avg_pool2d(F.pad(x, (0, -width % patch, 0, -height % patch)), patch)
        rows, columns = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = tokens + attend(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        grid = tokens.transpose(1, 2).reshape(*x.shape[:2], rows, columns)
        if patch > 1:
            # To the padded size and then cropped: a patch's centre stays where it was when the size is no multiple.
            grid = F.interpolate(grid, size=(rows * patch, columns * patch), mode="bilinear", align_corners=False)
        return grid[..., :height, :width]


class HybridCNNTransformerBlockV2(TimestepBlock):
    """A residual block, a multi-scale transformer on its output, and a fusion of both: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        num_heads: int = 8,
        patch_sizes: Sequence[int] = (1, 4, 8),
        bottleneck_ratio: float = 0.25,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(use_checkpoint)
        # The inner block keeps its activations: the whole is recomputed at once.
        self.cnn_block = ResBlock(channels, emb_channels, dropout, use_scale_shift_norm=use_scale_shift_norm)
        self.transformer_block = MultiScaleSparseTransformerBlockV2(
            channels, num_heads, dropout, patch_sizes, bottleneck_ratio
        )
        self.fusion = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), GroupNorm32(channels, groups=8), nn.SiLU())

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self._run(self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        local = self.cnn_block(x, emb)
        out: Tensor = self.fusion(torch.cat([local, self.transformer_block(local)], dim=1))
        return out
