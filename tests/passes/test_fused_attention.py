"""Attention that is written out becomes one fused operation, or stays what it was.

The layouts are tested in tests/test_deferred.py.
"""

import copy
import importlib.machinery
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from memopt import InputError, MemoptError, NothingToDo
from memopt.passes import AMP, Checkpoint, FusedAttention, OuterProduct
from memopt.registry import exactness
from tests.test_hae_model import batch, make
from tests.zoo import ZOO, differences, fingerprint, run
from tests.zoo.guided import checkpoint as guided_checkpoint

F64 = torch.float64


class ViT(nn.Module):
    """As in timm before it used the fused operation."""

    def __init__(self, width=24, heads=3, dropout=0.0):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj, self.attn_drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q @ k.transpose(-2, -1)) * self.scale
        if mask is not None:
            attn = attn.masked_fill(mask, float("-inf"))
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class CrossAttention(nn.Module):
    """As in Stable Diffusion: heads into the batch, einsum with spaces, an optional mask."""

    def __init__(self, width=24, context=10, heads=3):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        context = x[..., :10] if context is None else context

        def apart(t):
            b, n, _ = t.shape
            return t.reshape(b, n, self.heads, -1).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

        q, k, v = (apart(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        if mask is not None:
            sim.masked_fill_(mask, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        b, n, _ = out.shape
        return self.to_out(out.reshape(b // self.heads, self.heads, n, -1).permute(0, 2, 1, 3).reshape(x.shape))


class Careful(ViT):
    """Softmax in float32 whatever comes in; returns the weights on demand."""

    def forward(self, x, weights=False):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = torch.softmax(torch.matmul(q, k.mT) / 8**0.5, dim=-1, dtype=torch.float32).to(v.dtype)
        out = self.proj(torch.matmul(attn, v).transpose(1, 2).reshape(B, N, C))
        return (out, attn) if weights else out


def tokens(dtype=F64, n=2, length=33):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, length, 24, generator=generator, dtype=F64).to(dtype).requires_grad_()


def outcome(model, *args, **kwargs):
    torch.manual_seed(1)
    output = model(*args, **kwargs)
    wanted = [t for t in (*model.parameters(), *args) if t.requires_grad]
    found = output if isinstance(output, tuple) else (output,)
    loss = sum(t.to(F64).square().sum() for t in found)
    return [*(t.detach() for t in found), *torch.autograd.grad(loss, wanted)]


def worst(found, expected):
    # A gradient may be all rounding (that of the keys' bias): then the size of the others counts.
    size = max(float(x.abs().max()) for x in expected)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    return max(
        float((a - b).detach().abs().max()) / max(float(b.abs().max()), 1e-3 * size)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", [ViT, CrossAttention, Careful])
def test_exact_and_fewer_bytes(kind, train):
    dtype = torch.float32 if kind is Careful else F64  # which asks for float32 itself
    model, x = kind().to(dtype).train(train), tokens(dtype)
    expected = outcome(model, x)
    handle = memopt.apply(model, [FusedAttention()])
    assert worst(outcome(model, x), expected) <= (1e-5 if kind is Careful else 1e-12)
    assert handle.report().rows[0].counts == {"attentions fused": 1}
    handle.undo()
    model, x = model.float(), x.detach().float()
    plain = memopt.profile(model, x)
    fused = [memopt.profile(model, x, passes=["fused_attention"], real=real) for real in (False, True)]
    assert fused[0].kept == fused[1].kept < plain.kept
    assert fused[0].peak == fused[1].peak < plain.peak


def test_cross_attention_with_other_keys():
    model, x, context = CrossAttention().double(), tokens(), torch.randn(2, 7, 10, dtype=F64, requires_grad=True)
    expected = outcome(model, x, context)
    handle = memopt.apply(model, [FusedAttention()])
    assert worst(outcome(model, x, context), expected) < 1e-12
    assert "attentions fused: 1" in str(handle.report())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("how", ["dropout", "mask", "mask in place"])
def test_dropout_and_masks_stay_as_they_were(how, train):
    model = (CrossAttention() if how == "mask in place" else ViT(dropout=0.4 * (how == "dropout"))).double()
    model.train(train)
    mask = torch.rand(33, 33) > 0.7
    mask.fill_diagonal_(False)
    kwargs = {} if how == "dropout" else {"mask": mask}
    expected = outcome(model, tokens(), **kwargs)
    handle = memopt.apply(model, [FusedAttention()])
    found = outcome(model, tokens(), **kwargs)
    if how == "dropout" and not train:
        assert worst(found, expected) < 1e-12
        assert handle.report().rows[0].counts == {"attentions fused": 1}
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert "attentions fused" not in handle.report().rows[0].counts


def test_weights_that_are_returned():
    model, x = Careful(), tokens(torch.float32)
    expected = outcome(model, x, weights=True)
    handle = memopt.apply(model, [FusedAttention()])
    found = outcome(model, x, weights=True)
    assert torch.equal(found[1], expected[1])
    assert worst(found, expected) < 1e-5
    assert "made attention weights for the result of the model: 1" in str(handle.report())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [ViT, CrossAttention, Careful])
def test_half_precision_is_as_accurate_as_it_was(kind, dtype):
    truth = kind()
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_(2 * parameter.to(dtype))  # sharp attention; the same weights for both
    x = tokens(dtype)
    wide = copy.deepcopy(truth).double()
    expected = outcome(wide, x.detach().double().requires_grad_())
    model = truth.to(dtype)
    plain = outcome(model, x)
    handle = memopt.apply(model, [FusedAttention()])
    fused = outcome(model, x)
    assert [t.dtype for t in fused] == [t.dtype for t in plain]

    def off(found):
        return sum(worst([a.double()], [b]) ** 2 for a, b in zip(found, expected, strict=True)) ** 0.5

    assert off(fused) <= 1.1 * off(plain)
    assert handle.report().rows[0].counts == {"attentions fused": 1}


def test_under_autocast():
    model, x = ViT(), tokens(torch.float32)
    expected = outcome(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
    memopt.apply(model, [AMP()])
    plain = outcome(model, x)
    handle = memopt.apply(model, [FusedAttention()])
    fused = outcome(model, x)
    assert [t.dtype for t in fused] == [t.dtype for t in plain]
    for found in (plain, fused):
        assert worst([a.double() for a in found], expected) < 0.05
    assert handle.report().rows[0].counts == {"attentions fused": 1}


# Models.


@pytest.mark.parametrize("changes", [{}, {"use_new_attention_order": True}, {"num_heads": 1, "use_checkpoint": True}])
@pytest.mark.parametrize("more", [[], [Checkpoint()], [OuterProduct()], [OuterProduct(mode="sparse")]], ids=str)
def test_hae(changes, more):
    model, (x, t, y) = make(**changes).double(), batch()
    x = x.double().requires_grad_()

    class Called:
        parameters = staticmethod(model.parameters)

        def __call__(self, x):
            return model(x, t, y, null=torch.tensor([True, False]), clf_free=True)

    expected = outcome(Called(), x)
    handle = memopt.apply(model, [FusedAttention(), *more])
    for _ in range(2):
        assert worst(outcome(Called(), x), expected) < 1e-10
    fused = sum(row.counts.get("attentions fused", 0) for row in handle.report().rows)
    assert (fused > 0) == (OuterProduct() not in more)  # which leaves none


@pytest.mark.parametrize("name", ["hae_v2", "guided_unet"])
def test_fewer_bytes_on_whole_models(name):
    case = ZOO[name]
    model = case.build()
    args, kwargs = case.inputs()
    inputs = (tuple(a.detach() for a in args), kwargs)
    plain, fused = (memopt.profile(model, inputs, passes=passes) for passes in ([], ["fused_attention"]))
    assert fused.kept < plain.kept or name == "guided_unet"  # which recomputes its attention as it is
    assert fused.peak <= plain.peak
    assert fused.timeline.total != plain.timeline.total


def test_guided_unet_is_exact():
    case = ZOO["guided_unet"]
    plain, model = case.build().double(), case.build().double()
    handle = memopt.apply(model, [FusedAttention()])
    (loss, grads, _), (found, found_grads, _) = run(plain, case), run(model, case)
    assert abs(found - loss) <= 1e-12 * loss
    names = [name for name, grad in grads.items() if grad is not None]
    assert worst([found_grads[n] for n in names], [grads[n] for n in names]) < 1e-10
    assert handle.report().rows[0].counts == {"attentions fused": 8}  # four blocks, each also in its recomputation


@pytest.mark.parametrize("name", ["unet2d_condition", "dit", "gpt2", "vit", "sd3", "flux", "tied_weights"])
def test_nothing_to_do_where_nothing_is_written_out(name):
    model = ZOO[name].build()
    before = fingerprint(model)
    with pytest.raises(
        NothingToDo, match=r"modules that write attention out.* scaled_dot_product_attention already has "
    ):
        memopt.apply(model, ["fused_attention"])
    assert differences(before, fingerprint(model)) == []


def test_attention_that_is_set_to_be_written_out_is_found():
    from diffusers.models.attention_processor import AttnProcessor

    model = ZOO["unet2d_condition"].build()
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    case = ZOO["unet2d_condition"]
    expected = run(model, case)[0]
    handle = memopt.apply(model, ["fused_attention"])
    assert abs(run(model, case)[0] - expected) <= 1e-5 * expected
    assert handle.report().rows[0].counts["attentions fused"] > 0


def test_undo_copy_keys_report_and_options():
    model, x = nn.Sequential(ViT(), CrossAttention()).double(), tokens()
    before, keys = fingerprint(model), list(model.state_dict())
    handle = memopt.apply(model, ["fused_attention"])
    assert list(model.state_dict()) == keys
    assert [claim.path for claim in handle.report().rows[0].claims] == ["0", "1"]
    expected = outcome(model, x)
    twin = copy.deepcopy(model)
    handle.undo()
    assert differences(before, fingerprint(model)) == []
    assert worst(outcome(twin, x), expected) == 0
    with pytest.raises(
        InputError, match="backend 'fast' is not one of auto, flash, efficient, cudnn, math, fa3, xformers, sage"
    ):
        FusedAttention(backend="fast")


def test_backends():
    model, x = ViT().double(), tokens()
    expected = outcome(model, x)
    for backend in ("flash", "math"):
        with memopt.apply(model, [FusedAttention(backend=backend)]):
            assert worst(outcome(model, x), expected) < 1e-12
    with memopt.apply(model, [FusedAttention(backend="math")]):  # has a second derivative, as the model had
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()
    with memopt.apply(model, [FusedAttention(backend="cudnn")]):
        with pytest.raises(MemoptError, match=r"cudnn kernel cannot run this .*backend='auto' lets torch"):
            model(x)
        with pytest.raises(RuntimeError, match="must match"):  # an error of the model's own stays what it is
            model(x, mask=torch.ones(7, 7, dtype=torch.bool))
    for name, package in (("fa3", "flash_attn_interface"), ("sage", "sageattention")):
        with pytest.raises(InputError, match=f"backend '{name}' needs the package {package}, which is not installed"):
            memopt.apply(model, [FusedAttention(backend=name)])
    assert exactness(FusedAttention(backend="sage")) == "not exact"
    assert exactness(FusedAttention()) == "exact to rounding"
    assert worst(outcome(model, x), expected) == 0


LAYOUTS = {"fa3": "bthd", "xformers": "bthd", "sage": "bhtd"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packages_are_called_in_their_layout(name, monkeypatch):
    """The packages run on CUDA only, so torch's attention stands for theirs here; tests/gpu calls them."""
    calls = []

    def attend(q, k, v, *, softmax_scale=None, sm_scale=None, scale=None, tensor_layout="NHD", is_causal=False):
        calls.append((q.shape, k.shape, is_causal))
        turned = tensor_layout == "NHD"
        q, k, v = (x.transpose(1, 2) if turned else x for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale or sm_scale or scale)
        return out.transpose(1, 2) if turned else out

    package, function = {
        "fa3": ("flash_attn_interface", "flash_attn_func"),
        "xformers": ("xformers", "memory_efficient_attention"),
        "sage": ("sageattention", "sageattn"),
    }[name]
    module = types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None)
    monkeypatch.setitem(sys.modules, package, module)
    home = module
    if name == "xformers":
        home = types.ModuleType("xformers.ops")
        monkeypatch.setitem(sys.modules, "xformers.ops", home)
    setattr(home, function, attend)
    model, x = ViT().double(), tokens()
    expected = outcome(model, x)
    with memopt.apply(model, [FusedAttention(backend=name)]):
        assert worst(outcome(model, x), expected) < 1e-12
    shape = (2, 33, 3, 8) if LAYOUTS[name] == "bthd" else (2, 3, 33, 8)
    assert calls == [(shape, shape, False)]


def test_compile_and_export():
    model = nn.Sequential(ViT(), CrossAttention()).double()
    expected = [outcome(model, tokens(n=n)) for n in (2, 3)]
    memopt.apply(model, ["fused_attention"])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n, wanted in zip((2, 3), expected, strict=True):
        assert worst(outcome(compiled, tokens(n=n)), wanted) < 1e-12
    program = torch.export.export(model, (tokens().detach(),), strict=False)
    assert worst([program.module()(tokens().detach())], expected[0][:1]) < 1e-12
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("scaled_dot_product" in target for target in targets) == 2
    assert not [target for target in targets if "softmax" in target]


def test_compiled_products_keep_the_order_of_their_factors():
    """Tokens as many as channels, so that a wrong order would go unnoticed."""
    model, x = ViT().double(), tokens(length=8)
    expected = outcome(model, x)
    memopt.apply(model, [FusedAttention(backend="math")])
    torch._dynamo.reset()
    for compiled in (torch.compile(model, fullgraph=True, backend="eager"), model):
        assert worst(outcome(compiled, x), expected) < 1e-12
    torch._dynamo.reset()

    class Plain(ViT):
        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 8, 3, 3, 8).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.mT, -1)
            return self.proj((weights @ v + (weights.relu() @ v).sum()).reshape(x.shape))

    model = Plain().double()
    expected = outcome(model, x)
    memopt.apply(model, [FusedAttention()])
    assert worst(outcome(torch.compile(model, fullgraph=True, backend="eager"), x), expected) < 1e-12


def attention(query, key, value):
    """As in annotated transformers: a function, not a method."""
    return torch.softmax(torch.matmul(query, key.transpose(-2, -1)) / query.size(-1) ** 0.5, dim=-1) @ value


class ByFunction(ViT):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(x.shape))


class RecomputesAMethod(ByFunction):
    def forward(self, x):
        return checkpoint(self.attend, x, use_reentrant=False)


class RecomputesAFunction(ByFunction):
    def forward(self, x):
        return checkpoint(lambda x: ByFunction.attend(self, x), x, use_reentrant=False)


class RecomputesByHand(ByFunction):
    def forward(self, x):
        return guided_checkpoint(self.attend, (x,), tuple(self.parameters()), True)


class OwnSoftmax(ViT):
    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        softmax = Softmax.apply(q @ k.mT)
        return self.proj((softmax @ v).transpose(1, 2).reshape(x.shape))


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        weights = x.softmax(-1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        return weights * (grad - (grad * weights).sum(-1, keepdim=True))


FUSED = {ByFunction: 1, RecomputesAMethod: 2, RecomputesAFunction: 0, RecomputesByHand: 2, OwnSoftmax: 0}


@pytest.mark.parametrize("kind", FUSED)
def test_functions_and_recomputation_within_a_module(kind):
    model, x = kind().double(), tokens()
    expected = outcome(model, x)
    handle = memopt.apply(model, ["fused_attention"])
    assert worst(outcome(model, x), expected) < 1e-12
    assert handle.report().rows[0].counts.get("attentions fused", 0) == FUSED[kind]


def test_eager_attention_of_transformers_is_found():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=2, n_head=3, n_embd=24, vocab_size=50, attn_implementation="eager")
    model = GPT2Model(config).eval()
    handle = memopt.apply(model, ["fused_attention"])
    assert [claim.path for claim in handle.report().rows[0].claims] == ["h.0.attn", "h.1.attn"]


def test_products_of_matrices_that_are_no_attention():
    class Other(nn.Module):
        def forward(self, x):
            y = x @ x.mT
            gate = F.softmax(y.mean(-1), dim=-1)
            first = torch.softmax(y, dim=1) @ x
            third = (y + y.mT).softmax(-1) @ x
            return first * gate[..., None] + third + y[:, :, :24] + torch.bmm(y, x)

    model, x = Other(), tokens()
    expected = outcome(model, x)
    handle = memopt.apply(model, ["fused_attention"])
    assert worst(outcome(model, x), expected) == 0
    assert handle.report().rows[0].counts == {}
