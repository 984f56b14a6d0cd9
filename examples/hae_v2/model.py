"""The HAE V2 UNet: a class-conditional diffusion model whose decoder mixes convolutions and sparse transformers.

The network predicts the noise in an image. It is the UNet of guided diffusion (Dhariwal and Nichol, arXiv 2105.05233)
as AnoFPDM (arXiv 2404.15683) conditions it for classifier-free guidance, with one hybrid block at the end of every
decoder level but the last:

    x [N, in, H, W] -> 3x3 conv -> encoder levels: (ResBlock [, attention]) x num_res_blocks, stride 2 between levels
                    -> middle: ResBlock, attention, ResBlock
                    -> decoder levels: (skip, ResBlock [, attention]) x (num_res_blocks + 1), hybrid block, x2 between
                    -> norm, SiLU, 3x3 conv -> [N, out, H, W]

Timestep t and class y become embeddings of width E = 4 * model_channels. Their sum enters every residual block. The
class embedding c also enters every attention block, as E more keys and values made from its outer product with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import memopt
from memopt.passes import OuterProduct

from .blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    HybridCNNTransformerBlockV2,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    timestep_embedding,
    zeroed,
)

HYBRID_HEADS = 8


class HAEUNetModelV2(nn.Module):
    """The plain HAE V2 UNet, which builds the condition's outer product densely.

    Args:
        image_size: height and width of the images, divisible by 2 ** (levels - 1).
        in_channels: channels of the input.
        model_channels: base width; every level's width is a multiple of 32.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per encoder level (the decoder has one more).
        attention_resolutions: the downsampling factors (1, 2, 4, ...) whose levels have attention; factors that no
            level reaches are without effect, and the middle block always has attention.
        dropout: probability in the residual blocks and in the hybrid blocks' MLP.
        channel_mult: each level's width in units of model_channels.
        conv_resample: resample with convolutions rather than by means and repetition.
        dims: 2; volumes are not supported.
        num_classes: number of classes, None for a model without a condition.
        use_checkpoint: recompute the blocks' activations in the backward pass.
        use_fp16: keep and compute the encoder, middle and decoder in float16.
        num_heads: attention heads.
        num_head_channels: width of a head; -1 to derive it from num_heads, otherwise it sets their number.
        num_heads_upsample: heads in the decoder; -1 for num_heads.
        use_scale_shift_norm: the embedding scales and shifts instead of being added.
        resblock_updown: resample with residual blocks.
        use_new_attention_order: qkv channels split into q, k and v before the heads rather than after.
        clf_free: embed classes for classifier-free guidance (the condition can be dropped).
        use_hae: put the hybrid blocks into the decoder.
        bottleneck_ratio: width of the hybrid blocks' MLP relative to their channels.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        clf_free: bool = True,
        use_hae: bool = True,
        bottleneck_ratio: float = 0.25,
    ) -> None:
        super().__init__()
        if dims != 2:
            raise ValueError(f"dims must be 2 (images), got {dims}")
        channel_mult = tuple(channel_mult)
        if not channel_mult:
            raise ValueError("channel_mult must name at least one level")
        counts = {
            "image_size": image_size,
            "in_channels": in_channels,
            "model_channels": model_channels,
            "out_channels": out_channels,
            "num_res_blocks": num_res_blocks,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not 0 < bottleneck_ratio <= 1:
            raise ValueError(f"bottleneck_ratio must be in (0, 1], got {bottleneck_ratio}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1 or None, got {num_classes}")
        self.stride = 2 ** (len(channel_mult) - 1)
        if image_size % self.stride:
            raise ValueError(
                f"image_size {image_size} is not divisible by {self.stride}, the downsampling of {len(channel_mult)} "
                f"levels (channel_mult {channel_mult})"
            )
        widths = [int(mult * model_channels) for mult in channel_mult]
        for width, mult in zip(widths, channel_mult, strict=True):
            if width < 1 or width % 32:
                raise ValueError(
                    f"model_channels {model_channels} * channel_mult {mult} = {width} is not a multiple of 32, "
                    "the number of groups in each norm"
                )
        if int(min(widths) * bottleneck_ratio) < 1:
            raise ValueError(f"bottleneck_ratio {bottleneck_ratio} leaves no width of {min(widths)} channels")

        self.image_size = image_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.clf_free = clf_free
        self.attention_resolutions = tuple(attention_resolutions)

        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, model_channels if clf_free else emb_channels)
            self.class_emb: nn.Module = nn.Identity()
            if clf_free:
                self.class_emb = nn.Sequential(
                    nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
                )

        def res(channels: int, out: int | None = None, **changes: bool) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                dropout,
                out,
                use_scale_shift_norm=use_scale_shift_norm,
                use_checkpoint=use_checkpoint,
                **changes,
            )

        def attention(channels: int, name: str, heads: int) -> AttentionBlock:
            if num_head_channels != -1:
                name, heads = "num_head_channels", num_head_channels
            if heads < 1 or channels % heads:
                raise ValueError(f"{name} {heads} does not divide the {channels} channels of an attention block")
            return AttentionBlock(
                channels,
                heads if num_head_channels == -1 else channels // num_head_channels,
                None if num_classes is None else emb_channels,
                use_new_attention_order,
                use_checkpoint,
            )

        channels = widths[0]
        stem = TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))
        self.input_blocks = nn.ModuleList([stem])
        skips = [channels]
        layers: list[nn.Module]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [res(channels, width)]
                channels = width
                if 2**level in self.attention_resolutions:
                    layers.append(attention(channels, "num_heads", num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level < len(widths) - 1:
                down = res(channels, down=True) if resblock_updown else Downsample(channels, conv_resample)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(channels)

        self.middle_block = TimestepEmbedSequential(
            res(channels), attention(channels, "num_heads", num_heads), res(channels)
        )

        decoder_heads = (
            ("num_heads", num_heads) if num_heads_upsample == -1 else ("num_heads_upsample", num_heads_upsample)
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), width)]
                channels = width
                if 2**level in self.attention_resolutions:
                    layers.append(attention(channels, *decoder_heads))
                if level and index == num_res_blocks:
                    if use_hae:
                        layers.append(
                            HybridCNNTransformerBlockV2(
                                channels,
                                emb_channels,
                                dropout,
                                HYBRID_HEADS,
                                bottleneck_ratio=bottleneck_ratio,
                                use_scale_shift_norm=use_scale_shift_norm,
                                use_checkpoint=use_checkpoint,
                            )
                        )
                    layers.append(res(channels, up=True) if resblock_updown else Upsample(channels, conv_resample))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, out_channels, 3, padding=1))
        )
        if use_fp16:
            for torso in (self.input_blocks, self.middle_block, self.output_blocks):
                torso.half()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        threshold: float = -1,
        null: bool | Tensor = False,
        clf_free: bool = False,
    ) -> Tensor:
        """Predict the noise in x.

        A class-conditional model is called in one of two ways: with `threshold` > 0 (training) each sample's condition
        is dropped with that probability, drawn from the device's default generator; with `clf_free=True` it is
        kept, or dropped where `null` says so. A model built with clf_free=False needs neither and never drops.

        Args:
            x: noisy images [N, in_channels, H, W] in [-1, 1].
            timesteps: [N].
            y: classes [N]; may be left out when null is True.
            threshold: probability of dropping a condition, used if positive.
            null: True drops every condition; a bool tensor [N] those of the samples where it is True.
            clf_free: the conditions dropped are those that `null` names.

        Returns:
            [N, out_channels, H, W] in x's dtype.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, {self.in_channels}, H, W], got {list(x.shape)}")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(
                f"height and width of x must be divisible by {self.stride}, got {x.shape[2]} x {x.shape[3]}"
            )
        if timesteps.dim() != 1 or timesteps.shape[0] != x.shape[0]:
            raise ValueError(f"timesteps must be [{x.shape[0]}], one per sample of x, got {list(timesteps.shape)}")

        # Read from the parameters, so that the model works in whatever dtype it was converted to.
        outer_dtype, dtype = next(self.out.parameters()).dtype, next(self.input_blocks.parameters()).dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(outer_dtype))
        tokens = None
        condition = self._condition(x, y, threshold, null, clf_free)
        if condition is not None:
            emb = emb + condition
            tokens = self._outer_product(condition.to(dtype))

        emb = emb.to(dtype)
        h = x.to(dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, tokens)
            skips.append(h)
        h = self.middle_block(h, emb, tokens)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, tokens)
        out: Tensor = self.out(h.to(outer_dtype))
        return out.to(x.dtype)

    def _outer_product(self, condition: Tensor) -> Tensor:
        """The condition's extra attention tokens: c [N, E] -> c c^T [N, E, E], built once for all attention blocks."""
        return torch.einsum("ab,ac->abc", condition, condition)

    def _condition(
        self, x: Tensor, y: Tensor | None, threshold: float, null: bool | Tensor, clf_free: bool
    ) -> Tensor | None:
        """The class embedding c [N, E], zero where the condition is dropped; None for a model without classes."""
        n = x.shape[0]
        if self.num_classes is None:
            if y is not None:
                raise ValueError("y was given, but the model has no classes: build it with num_classes")
            return None
        drops = isinstance(null, Tensor) or null
        if threshold > 1:
            raise ValueError(f"threshold is a probability, at most 1, got {threshold}")
        if not self.clf_free and (threshold > 0 or drops):
            raise ValueError(
                "this model was built with clf_free=False: its condition cannot be dropped (threshold, null)"
            )
        if threshold > 0 and (clf_free or drops):
            raise ValueError(
                "threshold draws the conditions to drop and clf_free=True takes them from null: pass one, not both"
            )
        if self.clf_free and not (threshold > 0 or clf_free):
            raise ValueError(
                "a class-conditional model needs y and either threshold > 0 (training: drops conditions at random) or "
                "clf_free=True (keeps them; with null=True or a bool tensor [N] drops them)"
            )
        if y is None:
            if null is not True:
                raise ValueError(f"a class-conditional model needs y, the classes [{n}]")
            y = torch.zeros(n, dtype=torch.long, device=x.device)  # any class: it is dropped below
        if y.dim() != 1 or y.shape[0] != n:
            raise ValueError(f"y must be [{n}], one class per sample of x, got {list(y.shape)}")

        c: Tensor = self.class_emb(self.label_emb(y))
        dropped: Tensor
        if threshold > 0:
            dropped = torch.rand(n, device=x.device) < threshold
        elif isinstance(null, Tensor):
            if null.dtype != torch.bool or null.dim() != 1 or null.shape[0] != n:
                raise ValueError(f"null must be a bool or a bool tensor [{n}], got {null.dtype} {list(null.shape)}")
            dropped = null.to(x.device)
        elif null:
            dropped = torch.ones(n, dtype=torch.bool, device=x.device)
        else:
            return c
        # Out of place and never by skipping: a batch without any condition still gives every parameter a gradient.
        return torch.where(dropped[:, None], torch.zeros_like(c), c)


class HAEUNetModelV2Conservative(HAEUNetModelV2):
    """The plain HAE V2 UNet with memopt's `OuterProduct` applied: the condition's outer product is never made.

    Parameters and their names are the plain model's, outputs and gradients equal to rounding.

    Args:
        *args: as for `HAEUNetModelV2`.
        memory_optimization: False for the plain model.
        zero_threshold: for ``mode="sparse"`` of the pass: there a condition whose entries are all at most this large
            counts as dropped. The default mode treats all conditions alike and needs none.
        mode: of the pass.
        **kwargs: as for `HAEUNetModelV2`.
    """

    def __init__(
        self,
        *args: Any,
        memory_optimization: bool = True,
        zero_threshold: float = 1e-6,
        mode: Literal["rank_one", "sparse", "dense"] = "rank_one",
        **kwargs: Any,
    ) -> None:
        if not isinstance(memory_optimization, bool):
            raise ValueError(f"memory_optimization must be True or False, got {memory_optimization!r}")
        super().__init__(*args, **kwargs)
        outer_product = OuterProduct(mode=mode, zero_threshold=zero_threshold)
        self.memory_optimization = memory_optimization
        if memory_optimization:
            memopt.apply(self, [outer_product])
