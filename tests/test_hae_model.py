import json
import math
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from examples.hae_v2 import blocks
from examples.hae_v2.blocks import AttentionBlock, MultiScaleSparseTransformerBlockV2, SparseSelfAttention
from examples.hae_v2.model import HAEUNetModelV2, HAEUNetModelV2Conservative
from memopt.core import active_passes
from memopt.passes import OuterProduct

BRATS128 = json.loads((Path(__file__).parent / "data" / "brats128_state_dict.json").read_text())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(cls=HAEUNetModelV2, **changes):
    """A small model with attention, hybrid blocks and classes whose parameters are all different from zero."""
    config = {
        "image_size": 16,
        "in_channels": 2,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": (1, 2),
        "num_heads": 4,
        "num_classes": 3,
    }
    model = cls(**{**config, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(n=2, size=16):
    return torch.randn(n, 2, size, size), torch.arange(n) * 300 + 5, torch.arange(n) % 3


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# Names, shapes, sizes


@pytest.mark.parametrize("cls", [HAEUNetModelV2, HAEUNetModelV2Conservative])
def test_brats128_has_exactly_the_published_tensors(cls):
    with torch.device("meta"):
        model = cls(**BRATS128["config"])
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == BRATS128["state_dict"]
    assert count(model) == BRATS128["parameters"] == 117_086_148


def test_the_call_printed_in_the_notes_is_larger_than_they_say():
    config = dict(BRATS128["config"], attention_resolutions=[16, 8], channel_mult=(1, 2, 4, 8), num_heads=8)
    with torch.device("meta"):
        assert count(HAEUNetModelV2(**config)) == 303_644_868
        assert count(HAEUNetModelV2(**{**config, "num_classes": None})) == 297_012_164


def test_fresh_model_predicts_nothing():
    model = HAEUNetModelV2(16, 2, 32, 2, 1, [2], channel_mult=(1, 2), num_heads=4, num_classes=3)
    x, t, y = batch()
    assert not model(x, t, y, clf_free=True).any()


# The parts


def test_time_embedding_has_cosines_first():
    t = torch.tensor([0.0, 1.0, 700.0])
    half = torch.tensor([math.exp(-math.log(10000) * i / 4) for i in range(4)])
    expected = torch.cat([torch.cos(t[:, None] * half), torch.sin(t[:, None] * half)], dim=1)
    torch.testing.assert_close(blocks.timestep_embedding(t, 8), expected)
    assert blocks.timestep_embedding(torch.tensor([0]), 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_attention_equals_a_loop_over_heads(new_order, with_tokens):
    n, channels, heads, width = 2, 32, 4, 12
    block = AttentionBlock(channels, heads, width if with_tokens else None, new_order).double()
    torch.nn.init.normal_(block.proj_out.weight)
    x = torch.randn(n, channels, 3, 5, dtype=torch.float64)
    tokens = torch.randn(n, width, 7, dtype=torch.float64) if with_tokens else None

    size = channels // heads
    flat = x.reshape(n, channels, 15)
    normed = F.group_norm(flat, 32, block.norm.weight, block.norm.bias)
    qkv = block.qkv.weight[:, :, 0] @ normed + block.qkv.bias[:, None]
    outputs = []
    for head in range(heads):

        def rows(part, parts, head=head):
            start = (part * heads + head) * size if new_order else (head * parts + part) * size
            return slice(start, start + size)

        q, k, v = (qkv[:, rows(part, 3)] for part in range(3))
        if with_tokens:
            more = block.encoder_kv.weight[:, :, 0] @ tokens + block.encoder_kv.bias[:, None]
            k, v = (torch.cat([more[:, rows(i, 2)], old], dim=2) for i, old in enumerate((k, v)))
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(size), dim=-1)
        outputs.append(v @ weight.transpose(1, 2))
    mixed = block.proj_out.weight[:, :, 0] @ torch.cat(outputs, dim=1) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(x, tokens), (flat + mixed).reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_encoder_keys_stand_before_the_spatial_ones(monkeypatch):
    seen = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda w, *a, **k: (seen.append(softmax(w, *a, **k)), seen[-1])[1])
    block = AttentionBlock(32, 4, 8)
    with torch.no_grad():
        block.encoder_kv.weight.zero_()
        block.encoder_kv.bias.zero_()
    block(torch.randn(2, 32, 4, 4), torch.randn(2, 8, 6))
    assert seen[0].shape == (8, 16, 22)
    assert seen[0].dtype == torch.float32
    first = seen[0][:, :, :6]  # keys of zero: equal weights
    torch.testing.assert_close(first, first[:, :, :1].expand_as(first))


def test_group_norm_computes_in_float32():
    norm = blocks.GroupNorm32(32)
    x = torch.randn(2, 32, 4, 4) * 100 + 1000
    low = norm(x.half())
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), norm(x.half().float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("height", [8, 11])
def test_transformer_block_is_what_the_description_says(height):
    block = MultiScaleSparseTransformerBlockV2(32, 8).eval()
    x = torch.randn(2, 32, height, 9)
    scales = []
    for patch, attend in zip((1, 4, 8), block.attentions, strict=True):
        rows, columns = math.ceil(height / patch), math.ceil(9 / patch)
        padded = torch.zeros(2, 32, rows * patch, columns * patch)
        padded[:, :, :height, :9] = x
        tokens = padded.reshape(2, 32, rows, patch, columns, patch).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
        tokens = tokens + attend(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
        grid = tokens.transpose(1, 2).reshape(2, 32, rows, columns)
        scales.append(F.interpolate(grid, size=padded.shape[2:], mode="bilinear")[:, :, :height, :9])
    expected = block.scale_fusion(torch.cat(scales, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), expected)


# Sparse attention


@pytest.mark.parametrize("n", [65, 100, 256, 1000, 1024, 4096])
def test_pattern_keeps_its_own_block_and_a_tenth_of_the_keys(n):
    block, number, pattern = blocks.sparse_pattern(n)
    assert (number - 1) * block < n <= number * block
    rows = [pattern[i : i + len(pattern) // number] for i in range(0, len(pattern), len(pattern) // number)]
    assert len(rows) == number
    for own, row in enumerate(rows):
        assert own in row
        assert list(row) == sorted(set(row))
        assert all(0 <= other < number for other in row)
        assert 0.08 <= len(row) / number <= 0.12
    assert len(set(rows)) > number // 2


def test_pattern_is_fixed():
    # Written out, because weights trained with one pattern belong to it.
    assert blocks.sparse_pattern(65)[2][:8] == (0, 9, 1, 7, 2, 18, 3, 10)
    first = blocks._draw_pattern(1024)
    blocks._draw_pattern.cache_clear()
    assert blocks._draw_pattern(1024) == first


def test_sparse_attention_never_touches_the_global_generators():
    blocks._draw_pattern.cache_clear()
    attention = SparseSelfAttention(32)
    states = torch.get_rng_state(), random.getstate()
    outputs = [attention(x) for x in [torch.ones(1, 256, 32)] * 2]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert torch.equal(*outputs)
    assert sorted(attention.state_dict()) == ["in_proj_bias", "in_proj_weight", "out_proj.bias", "out_proj.weight"]


@pytest.mark.parametrize("n", [1, 9, 64, 65, 100, 256])
def test_sparse_attention_equals_masked_dense_attention(n):
    attention = SparseSelfAttention(32, 8).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True)
    forbidden = torch.zeros(n, n, dtype=torch.bool)
    if n > 64:
        block, number, pattern = blocks.sparse_pattern(n)
        allowed = torch.zeros(number, number, dtype=torch.bool)
        allowed[torch.arange(number).repeat_interleave(len(pattern) // number), torch.tensor(pattern)] = True
        forbidden = ~allowed.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
        assert forbidden.float().mean() > 0.85
    else:
        assert not forbidden.any()
    dense = torch.nn.MultiheadAttention(32, 8, batch_first=True).double()
    dense.load_state_dict(attention.state_dict())
    expected = dense(x, x, x, attn_mask=forbidden, need_weights=False)[0]
    got = attention(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("n", [4096, 4000])
def test_nothing_quadratic_in_4096_tokens(n):
    attention = SparseSelfAttention(32, 8)
    x = torch.randn(1, n, 32, requires_grad=True)
    with Largest() as largest:
        attention(x).sum().backward()
    # The largest are the gathered keys and values, 3 blocks for each block of queries.
    assert 3 * n * 32 <= largest.elements <= 4 * n * 32 < n * n / 16


def test_compiler_sees_one_graph():
    attention = SparseSelfAttention(32, 8)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    x = torch.randn(2, 100, 32)
    torch.testing.assert_close(compiled(x), attention(x))


# Conditions


def test_threshold_drops_at_random_and_null_by_name():
    model = make().eval()
    x, t, y = batch(4)
    kept = model(x, t, y, clf_free=True)
    none = model(x, t, y, clf_free=True, null=True)
    null = torch.tensor([True, False, False, True])
    mixed = model(x, t, y, clf_free=True, null=null)
    torch.testing.assert_close(mixed, torch.where(null[:, None, None, None], none, kept))
    assert (kept - none).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(model(x, t, clf_free=True, null=True), none)
    torch.testing.assert_close(model(x, t, y, threshold=1), none)
    torch.manual_seed(1)
    drawn = torch.rand(4) < 0.5
    assert 0 < drawn.sum() < 4
    torch.manual_seed(1)
    torch.testing.assert_close(model(x, t, y, threshold=0.5), model(x, t, y, clf_free=True, null=drawn))


def test_all_null_batch_reaches_every_parameter():
    model = make()
    x, t, y = batch()
    model(x, t, y, clf_free=True, null=True).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    # The tokens of a dropped condition are keys and values made of the biases: leaving them out is another function.
    model.eval()
    kept = model(x, t, y, clf_free=True, null=True)
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.encoder_kv = None
    assert (model(x, t, y, clf_free=True, null=True) - kept).abs().max() > 1e-4


def test_model_without_classes():
    model = make(num_classes=None)
    x, t, y = batch()
    assert model(x, t).shape == x.shape
    assert not [name for name in model.state_dict() if "encoder_kv" in name or "emb." in name.replace("time_embed", "")]
    with pytest.raises(ValueError, match="num_classes"):
        model(x, t, y)


def test_model_with_classes_but_without_guidance():
    model = make(clf_free=False).eval()
    x, t, y = batch()
    assert model.label_emb.weight.shape == (3, 128)
    torch.testing.assert_close(model(x, t, y), model(x, t, y, clf_free=True))
    with pytest.raises(ValueError, match="clf_free=False"):
        model(x, t, y, threshold=0.1)


# Options


@pytest.mark.parametrize(
    "changes",
    [
        {"use_scale_shift_norm": True},
        {"resblock_updown": True},
        {"conv_resample": False},
        {"use_hae": False},
        {"use_new_attention_order": True},
        {"num_head_channels": 16, "num_heads_upsample": 2},
        {"num_heads_upsample": 8},
        {"bottleneck_ratio": 0.5},
        {"channel_mult": (1,)},
        {"channel_mult": (1, 1, 2), "attention_resolutions": (1, 4, 16), "num_res_blocks": 2},
    ],
    ids=str,
)
def test_options(changes):
    model = make(**changes)
    x, t, y = batch()
    out = model(x, t, y, threshold=0.1)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_options_reach_the_blocks():
    heads = [m.num_heads for m in make(num_heads_upsample=8).modules() if isinstance(m, AttentionBlock)]
    assert heads == [4, 4, 8, 8]  # encoder, middle, decoder
    model = make(num_head_channels=16)
    assert {m.num_heads for m in model.modules() if isinstance(m, AttentionBlock)} == {4}
    assert make(use_scale_shift_norm=True).middle_block[0].emb_layers[1].out_features == 128
    assert make(bottleneck_ratio=0.5).output_blocks[1][2].transformer_block.mlp.mlp[0].out_features == 32
    assert [type(m).__name__ for m in make().output_blocks[1]] == [
        "ResBlock",
        "AttentionBlock",
        "HybridCNNTransformerBlockV2",
        "Upsample",
    ]


def gradients(model, seed=1):
    torch.manual_seed(0)
    x, t, y = batch(size=32)  # 256 tokens at the hybrid block: its sparse attention takes part
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(x, t, y, threshold=0.3).square().sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_recomputation_is_bitwise_equal():
    plain = make(dropout=0.3)
    recomputing = make(dropout=0.3, use_checkpoint=True)
    recomputing.load_state_dict(plain.state_dict())
    switched = [m for m in recomputing.modules() if getattr(m, "use_checkpoint", False)]
    assert len(switched) == 13  # 8 residual, 4 attention, 1 hybrid block, which recomputes its own residual block
    first = gradients(plain)
    assert all(map(torch.equal, first, gradients(recomputing)))
    assert not all(map(torch.equal, first, gradients(plain, seed=2)))  # dropout does something
    for module in switched:
        module.use_checkpoint = False  # read at each call
    assert all(map(torch.equal, first, gradients(recomputing)))


def test_recomputation_saves_less():
    sizes = []
    for use_checkpoint in (False, True):
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = make(use_checkpoint=use_checkpoint)
        x, t, y = batch()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x, t, y, threshold=0.3)
        sizes.append(sum(saved.values()))
    assert sizes[1] < 0.6 * sizes[0]


def test_fp16_torso_is_close():
    plain = make().eval()
    half = make(use_fp16=True).eval()
    half.load_state_dict(plain.state_dict())
    assert half.middle_block[0].in_layers[2].weight.dtype == torch.float16
    assert half.out[2].weight.dtype == half.time_embed[0].weight.dtype == torch.float32
    x, t, y = batch()
    with torch.no_grad():
        expected, got = (model(x, t, y, clf_free=True) for model in (plain, half))
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_whole_model_in_float64_agrees():
    model = make().eval()
    x, t, y = batch()
    single = model(x, t, y, clf_free=True)
    double = model.double()(x.double(), t, y, clf_free=True)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


def trained(model, null):
    """The output and all gradients of a step, with these conditions dropped."""
    torch.manual_seed(3)
    x, t, y = batch()
    model.zero_grad()
    out = model(x.double(), t, y, clf_free=True, null=torch.tensor(null))
    out.square().mean().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("null", [[False, False], [True, False], [True, True]])
@pytest.mark.parametrize("mode", ["rank_one", "sparse", "dense"])
def test_conservative_model_is_the_plain_one(mode, null):
    plain, conservative = make().double(), make(HAEUNetModelV2Conservative, mode=mode).double()
    assert list(conservative.state_dict()) == list(plain.state_dict())
    conservative.load_state_dict(plain.state_dict())
    expected, found = trained(plain, null), trained(conservative, null)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10 * scale)
    again = make().double()
    again.load_state_dict(conservative.state_dict())
    assert torch.equal(trained(again, null)["output"], expected["output"])


def test_conservative_model_without_optimization_is_untouched():
    model = make(HAEUNetModelV2Conservative, memory_optimization=False)
    assert type(model) is HAEUNetModelV2Conservative
    assert active_passes(model).passes == ()
    assert active_passes(make(HAEUNetModelV2Conservative)).passes == (OuterProduct(zero_threshold=1e-6),)


def test_export_captures_the_model():
    model = make().eval()
    args = batch(size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        exported = torch.export.export(model, args, {"clf_free": True}, strict=False)
    torch.testing.assert_close(exported.module()(*args, clf_free=True), model(*args, clf_free=True))


def test_fake_tensors_run_through_and_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = HAEUNetModelV2(32, 2, 32, 2, 1, [2], channel_mult=(1, 2), num_heads=4, num_classes=3)
        x, t, y = batch(size=32)
        assert model(x, t, y, threshold=0.1).shape == x.shape
    x, t, y = batch(size=32)
    assert type(make()(x, t, y, clf_free=True)) is torch.Tensor


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 3}, r"dims must be 2 \(images\), got 3"),
        ({"image_size": 15}, r"image_size 15 is not divisible by 2, the downsampling of 2 levels"),
        ({"model_channels": 48}, r"model_channels 48 \* channel_mult 1 = 48 is not a multiple of 32"),
        ({"channel_mult": ()}, "channel_mult must name at least one level"),
        ({"num_heads": 5}, "num_heads 5 does not divide the 64 channels"),
        ({"num_head_channels": 24}, "num_head_channels 24 does not divide the 64 channels"),
        ({"num_heads_upsample": 5}, "num_heads_upsample 5 does not divide the 64 channels"),
        ({"num_heads": 0}, "num_heads 0 does not divide"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
        ({"bottleneck_ratio": 0}, r"bottleneck_ratio must be in \(0, 1\], got 0"),
        ({"bottleneck_ratio": 0.01}, r"bottleneck_ratio 0.01 leaves no width"),
        ({"num_classes": 0}, "num_classes must be at least 1 or None, got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_constructor_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_conservative_arguments_are_checked():
    for changes in (
        {"zero_threshold": -1},
        {"zero_threshold": math.nan},
        {"memory_optimization": "yes"},
        {"mode": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            make(HAEUNetModelV2Conservative, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "needs y and either threshold > 0 .* or clf_free=True"),
        ({"null": True}, "clf_free=True"),
        ({"clf_free": True, "y": None}, r"needs y, the classes \[2\]"),
        ({"threshold": 0.1, "clf_free": True}, "pass one, not both"),
        ({"threshold": 2}, "threshold is a probability, at most 1, got 2"),
        ({"clf_free": True, "y": torch.zeros(3, dtype=torch.long)}, r"y must be \[2\]"),
        ({"clf_free": True, "null": torch.zeros(2)}, r"null must be a bool or a bool tensor \[2\]"),
        ({"clf_free": True, "null": torch.zeros(3, dtype=torch.bool)}, r"null must be .* \[3\]"),
        ({"x": torch.zeros(2, 3, 16, 16)}, r"x must be \[N, 2, H, W\], got \[2, 3, 16, 16\]"),
        ({"x": torch.zeros(2, 2, 15, 16)}, "height and width of x must be divisible by 2, got 15 x 16"),
        ({"timesteps": torch.tensor(5)}, r"timesteps must be \[2\]"),
    ],
    ids=lambda value: "",
)
def test_forward_names_what_is_wrong(call, message):
    x, t, y = batch()
    with pytest.raises(ValueError, match=message):
        make()(**{"x": x, "timesteps": t, "y": y, **call})
