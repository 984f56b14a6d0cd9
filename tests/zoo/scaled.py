"""Models of the zoo at a size where memory is worth counting: a training step takes more than 64 MiB, and a second or
so on one core. For comparisons with the allocator, where the zoo's own are too small: a few bytes of its bookkeeping
would be per cents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from . import Case, Draw, Inputs, guided, reseeded

SCALED: dict[str, Case] = {}


def add(name: str, make: Callable[[], nn.Module], inputs: Callable[[Draw], Inputs]) -> None:
    seed = 200 + len(SCALED)
    SCALED[name] = Case(name, lambda: reseeded(seed, make), lambda: inputs(Draw()), blocks=True)


def hae_v2() -> nn.Module:
    from examples.hae_v2.model import HAEUNetModelV2

    return HAEUNetModelV2(
        image_size=32,
        in_channels=4,
        model_channels=64,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(2,),
        dropout=0.1,
        channel_mult=(1, 2),
        num_classes=2,
        num_heads=4,
    )


def unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
        dropout=0.1,
    )


def unet2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        dropout=0.1,
    )


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=24,
        in_channels=4,
        num_layers=6,
        dropout=0.1,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        latent_channels=4,
        sample_size=48,
    )


def monai_unet() -> nn.Module:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_res_blocks=2,
        channels=(32, 64, 128),
        attention_levels=(False, False, True),
        num_head_channels=32,
        with_conditioning=True,
        cross_attention_dim=48,
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            image_size=64,
            patch_size=8,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2003, n_positions=96, n_embd=192, n_layer=6, n_head=6, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


add(
    "hae_v2",
    hae_v2,
    lambda d: ((d.normal(4, 4, 32, 32), d.ids(1000, 4)), {"y": torch.tensor([0, 1, 1, 0]), "threshold": 0.5}),
)
add(
    "guided_unet",
    lambda: guided.UNetModel(model_channels=48, num_res_blocks=2, channel_mult=(1, 2)),
    lambda d: ((d.normal(4, 3, 32, 32), d.ids(1000, 4)), {"y": d.ids(5, 4)}),
)
add(
    "unet2d",
    unet2d,
    lambda d: ((d.normal(2, 3, 32, 32), d.ids(1000, 2)), {"class_labels": d.ids(4, 2)}),
)
add(
    "unet2d_condition",
    unet2d_condition,
    lambda d: (
        (d.normal(2, 4, 32, 32), d.ids(1000, 2)),
        {"encoder_hidden_states": d.normal(2, 11, 96), "return_dict": False},
    ),
)
add(
    "dit",
    dit,
    lambda d: ((d.normal(6, 4, 16, 16),), {"timestep": d.ids(1000, 6), "class_labels": d.ids(10, 6)}),
)
add("autoencoder_kl", autoencoder, lambda d: ((d.normal(1, 3, 96, 96),), {"sample_posterior": True}))
add(
    "monai_diffusion_unet",
    monai_unet,
    lambda d: ((d.normal(2, 2, 48, 48), d.ids(1000, 2)), {"context": d.normal(2, 11, 48)}),
)
add("vit", vit, lambda d: ((d.normal(6, 3, 64, 64),), {}))
add(
    "gpt2",
    gpt2,
    # With a mask that is all ones, or none, transformers reads values to leave the mask away, but not those of fake
    # tensors: their estimate has the mask.
    lambda d: (
        (d.ids(2003, 4, 96),),
        {"attention_mask": (torch.arange(96) < 90).long().expand(4, 96).clone(), "use_cache": False},
    ),
)


def recipe(preset: str, batch: int) -> Case:
    """The model of examples/hae_v2, called as the training loop calls it: for each sample, whether its class is
    dropped."""
    from memopt.recipe import load_recipe

    hae = load_recipe(Path(__file__).resolve().parents[2] / "examples" / "hae_v2")
    config = hae.presets[preset]

    def inputs() -> Inputs:
        draw, size = Draw(), config.image_size
        noisy, steps = draw.normal(batch, 4, size, size), draw.ids(1000, batch)
        return (noisy, steps), {"y": draw.ids(2, batch), "null": draw.ids(2, batch).bool(), "clf_free": True}

    return Case(f"HAE V2 {preset}, batch {batch}", lambda: hae.model(config), inputs, blocks=True)


def unet2d_large() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=128,
        block_out_channels=(128, 256, 256, 512),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def stable_diffusion() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def dit_large() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, in_channels=4, num_layers=28)


def large(name: str, make: Callable[[], nn.Module], inputs: Callable[[Draw], Inputs]) -> Case:
    return Case(name, make, lambda: inputs(Draw()), blocks=True)


def with_amp(model: nn.Module) -> nn.Module:
    import memopt
    from memopt.passes.amp import AMP

    memopt.apply(model, [AMP()])
    return model


def for_a_gpu() -> list[Case]:
    """Models of the size that people train on one GPU, with weights as their constructors leave them."""
    return [
        recipe("brats128", 4),
        recipe("brats128", 14),
        large("UNet2DModel 128x128, batch 8", unet2d_large, lambda d: ((d.normal(8, 3, 128, 128), d.ids(1000, 8)), {})),
        large(
            "UNet2DConditionModel (Stable Diffusion 1), batch 2",
            stable_diffusion,
            lambda d: ((d.normal(2, 4, 64, 64), d.ids(1000, 2)), {"encoder_hidden_states": d.normal(2, 77, 768)}),
        ),
        large(
            "DiT-XL/2 256x256, batch 8",
            dit_large,
            lambda d: ((d.normal(8, 4, 32, 32),), {"timestep": d.ids(1000, 8), "class_labels": d.ids(1000, 8)}),
        ),
        large(
            "UNet2DConditionModel (Stable Diffusion 1), bf16 by AMP, batch 2",
            lambda: with_amp(stable_diffusion()),
            lambda d: ((d.normal(2, 4, 64, 64), d.ids(1000, 2)), {"encoder_hidden_states": d.normal(2, 77, 768)}),
        ),
        large(
            "DiT-XL/2 256x256, weights in bf16, batch 8",
            lambda: dit_large().bfloat16(),
            lambda d: (
                (d.normal(8, 4, 32, 32).bfloat16(),),
                {"timestep": d.ids(1000, 8), "class_labels": d.ids(1000, 8)},
            ),
        ),
        large(
            "UNet2DModel 128x128, channels last, batch 8",
            lambda: unet2d_large().to(memory_format=torch.channels_last),
            lambda d: ((d.normal(8, 3, 128, 128).to(memory_format=torch.channels_last), d.ids(1000, 8)), {}),
        ),
    ]
