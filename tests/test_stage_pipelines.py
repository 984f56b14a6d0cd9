"""Stages of real pipelines, and together with passes, profiles, copies and compiled code."""

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memopt
from memopt import MemoptError
from memopt.memory.ledger import Ledger
from memopt.stage import stage
from tests.test_stage import A, B, C, X, assert_same_trace, chain, trace_of


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def stable_diffusion(folder):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    pipe = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16),
        text_encoder=CLIPTextModel(config),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=8,
            attention_head_dim=2,
        ),
        vae=AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            sample_size=16,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted(pipe):
    draw = torch.Generator().manual_seed(1)
    return torch.from_numpy(pipe("a cat", num_inference_steps=2, output_type="np", generator=draw).images)


def test_a_stable_diffusion_pipeline(tmp_path):
    pipe = stable_diffusion(tmp_path)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "unet")}
    expected, time = painted(pipe), pipe.unet.time_embedding(torch.ones(1, 32))
    latents = pipe.vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean
    before = trace_of(*parts.values())
    sizes = {name: sum(p.nbytes for p in (*m.parameters(), *m.buffers())) for name, m in parts.items()}
    with stage(pipe) as handle:
        assert torch.equal(painted(pipe), expected)
        assert torch.equal(painted(pipe), expected)
        report = handle.report()
        assert report.bytes == sizes
        assert report.loads == {"vae": 2, "text_encoder": 2, "unet": 2}
        assert report.resident == ("vae",)
        assert report.peak_bytes == sizes["unet"]
        assert torch.equal(pipe.unet.time_embedding(torch.ones(1, 32)), time)  # a submodule
        assert handle.report().resident == ("unet",)
        assert torch.equal(pipe.vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean, latents)
        assert handle.report().resident == ("vae",)
    assert_same_trace(trace_of(*parts.values()), before)
    assert torch.equal(painted(pipe), expected)


def test_a_pipeline_runs_where_its_parts_do_although_they_wait_elsewhere(tmp_path):
    with FakeTensorMode(allow_non_fake_inputs=True):
        pipe = stable_diffusion(tmp_path)
    with stage(pipe, device="cuda") as handle:
        assert next(pipe.text_encoder.parameters()).device.type == "cpu"
        assert pipe.device == pipe._execution_device == pipe.vae.device == torch.device("cuda:0")
        assert handle.device == torch.device("cuda:0")
        assert pipe.unet.dtype == torch.float32
    assert pipe.device == pipe._execution_device == torch.device("cpu")
    assert {p.device.type for p in pipe.vae.parameters()} == {"cpu"}


def test_a_pipeline_of_one_model():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(1)).images

    expected = torch.from_numpy(run())
    with stage(pipe) as handle:
        assert torch.equal(torch.from_numpy(run()), expected)
        assert handle.report().loads == {"unet": 1}


def test_methods_generation_and_projections():
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=49)
    ).eval()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4})).eval()
    tokens = torch.tensor([[3, 4, 5]])

    def run():
        written = gpt.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=49)
        features = clip.get_text_features(tokens)
        return written, features if isinstance(features, torch.Tensor) else features[1]

    expected = run()
    with stage({"gpt": gpt, "clip": clip}) as handle, torch.enable_grad():
        gpt.requires_grad_(True)
        clip.requires_grad_(False)
        found = run()  # generate has a no_grad of its own
        assert handle.report().loads == {"gpt": 1, "clip": 1}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Model(nn.ModuleDict):
    def forward(self, x):
        return self["c"](self["b"](self["a"](x)))


# --- with the rest of memopt -------------------------------------------------------------------------------------


def test_passes_before_and_after():
    model = Model(chain())
    with memopt.apply(model["b"], ["amp"]):
        expected = model(X["a"])
    before = trace_of(model)
    passes = memopt.apply(model["b"], ["amp"])
    with stage(dict(model.items())) as handle:
        assert torch.equal(model(X["a"]), expected)
        with pytest.raises(MemoptError, match=r"the class of a Linear was changed after memopt\.apply"):
            passes.undo()
        assert torch.equal(model(X["a"]), expected)
        assert handle.report().loads["b"] == 2
    passes.undo()
    handle = stage(dict(model.items()))
    passes = memopt.apply(model["b"], ["amp"])
    assert torch.equal(model(X["a"]), expected)
    with pytest.raises(MemoptError, match=r"the class of a Linear was changed after it.*Undo these passes first"):
        handle.undo()
    assert torch.equal(model(X["a"]), expected)
    passes.undo()
    handle.undo()
    assert_same_trace(trace_of(model), before)


@pytest.mark.parametrize("real", [False, True])
def test_profiles_see_what_is_on_the_device(real):
    model = Model(chain())
    plain = memopt.profile(model, X["a"], train=False, real=real)
    assert plain.start_by_category["parameters"] == A + B + C
    with stage(dict(model.items())) as handle:
        staged = memopt.profile(model, X["a"], train=False, real=real)
        assert staged.peak_by_category["parameters"] == staged.start_by_category["parameters"] == C
        assert staged.off_device == {"cpu": A + B + C}
        assert handle.report().loads["a"] == (2 if real else 0)  # otherwise a copy ran


def test_a_profile_needs_no_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Model(chain())
    with stage(dict(model.items()), device="cuda"):
        assert memopt.profile(model, X["a"], train=False).peak_by_category["parameters"] == C


def test_a_copy_is_staged_for_itself():
    model = Model(chain())
    expected = model(X["a"])
    with stage(dict(model.items())) as handle:
        part, whole, inner = (
            copy.deepcopy(model["a"]),
            copy.deepcopy(model),
            copy.deepcopy(nn.Sequential(model["b"])[0]),
        )
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(whole(X["a"]), expected)
        assert torch.equal(inner(part(X["a"])), whole["b"](whole["a"](X["a"])))
        assert set(handle.report().loads.values()) == {0}
        assert (model(X["a"]) == 0).all()
    assert torch.equal(whole(X["a"]), expected)


def test_fake_tensors():
    with FakeTensorMode(), Ledger(fakes=True) as ledger:
        parts = chain()
        x = torch.ones(1, 10)
        with stage(parts):
            for name in "abc":
                x = parts[name](x)
            gc.collect()
            assert ledger.total - x.nbytes == C
            assert ledger.off_device == {"cpu": A + B + C}


def test_compiled_parts():
    parts = chain()
    expected = {name: part(X[name]) for name, part in parts.items()}
    parts["a"].compile(backend="eager")
    staged = {**parts, "b": torch.compile(parts["b"], backend="eager")}
    with stage(staged) as handle:
        for _ in range(2):
            assert all(torch.equal(part(X[name]), expected[name]) for name, part in staged.items())
        assert handle.report().loads == {"a": 2, "b": 2, "c": 2}
