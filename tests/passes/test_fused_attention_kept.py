"""Attention whose parts are changed, kept, looked at or computed with care stays exactly what it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt.passes import AMP
from tests.passes.test_fused_attention import ViT, outcome, tokens, worst


class Apart(ViT):
    """Queries, keys and values for attention that is written below."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.attend(q.clone(), k.clone(), v.clone(), torch.softmax)


class FastWeights(Apart):
    def attend(self, q, k, v, softmax):
        memory = torch.zeros(len(q), 24, 24, dtype=q.dtype)
        local = softmax(q @ k.mT, -1) @ v
        for _ in range(2):
            read = torch.bmm(q.detach(), memory)
            memory.add_(k.detach().mT @ v.detach())
            local = local + read
        return local


class QueriesChange(Apart):
    def attend(self, q, k, v, softmax):
        logits = q @ k.detach().mT / 3
        q.add_(3.0)
        return softmax(logits, -1) @ v + q


class KeysChange(Apart):
    def attend(self, q, k, v, softmax):
        logits = q.detach() @ k.mT / 3
        F.relu(k, True)
        return softmax(logits, -1) @ v + k


class Masked(Apart):
    """A cast to the type that is there already gives the tensor itself."""

    def attend(self, q, k, v, softmax):
        logits = q @ k.mT
        weights = logits.to(v.dtype)
        logits.masked_fill_(torch.ones(33, 33).triu(1).bool(), -1e9)
        return softmax(weights, -1) @ v


class WeightsMasked(Apart):
    def attend(self, q, k, v, softmax):
        weights = softmax(q.detach() @ k.detach().mT, -1)
        same = weights.to(v.dtype)
        weights.mul_(torch.ones(33, 33, dtype=v.dtype).tril())
        return same @ v


class Hook(Apart):
    def attend(self, q, k, v, softmax):
        logits = q @ k.mT
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * 2)
        return softmax(logits, -1) @ v


class Unlearned(Apart):
    """Logits without a gradient, then weights without one."""

    def attend(self, q, k, v, softmax):
        with torch.no_grad():
            logits = q @ k.mT
        first = softmax(logits, -1) @ v
        logits = q @ k.mT
        with torch.no_grad():
            weights = softmax(logits, -1)
        return first + weights @ v


class Out(Apart):
    def attend(self, q, k, v, softmax):
        logits = torch.empty(len(q), 33, 33, dtype=q.dtype)
        with torch.no_grad():
            torch.baddbmm(logits, q, k.mT, beta=0, alpha=0.3, out=logits)
        return softmax(logits, -1) @ v


class Rounded(Apart):
    def attend(self, q, k, v, softmax):
        weights = softmax((q @ k.mT).half().to(q.dtype), -1)
        return weights.to(torch.float8_e4m3fn).to(v.dtype) @ v


class Graph(Apart):
    """Values that are a product of matrices, too."""

    def attend(self, q, k, v, softmax):
        values = torch.bmm(softmax(k, 1).mT @ k, v.mT).mT
        return torch.einsum("bij,bjd->bid", softmax(q @ k.mT, -1), values)


class Typed(Apart):
    def attend(self, q, k, v, softmax):
        logits = q @ k.mT
        return softmax(logits + torch.zeros(33, 33).type(logits.type()), -1) @ v


class Integers(Apart):
    def attend(self, q, k, v, softmax):
        logits = ((3 * q).long() @ (3 * k).long().mT) / 8
        assert logits.dtype == torch.get_default_dtype()
        return softmax(logits.to(v.dtype), -1) @ v


KEPT = (
    FastWeights,
    QueriesChange,
    KeysChange,
    Masked,
    WeightsMasked,
    Hook,
    Unlearned,
    Out,
    Rounded,
    Graph,
    Typed,
    Integers,
)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KEPT)
def test_kept(kind, grad):
    model, x = kind().double(), tokens()

    def run():
        if not grad:
            with torch.no_grad():
                return [model(x)]
        output = model(x)
        wanted = [p for p in (x, *model.parameters()) if p.shape[:1] != (24,)]  # no projection is used
        return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]

    expected = run()
    with memopt.apply(model, ["fused_attention"]):
        assert worst(run(), expected) < 1e-12


@pytest.mark.parametrize("kind", [FastWeights, QueriesChange, KeysChange, Masked, Graph])
def test_kept_when_compiled(kind):
    model, x = kind().double(), tokens()
    expected = model(x).detach()
    memopt.apply(model, ["fused_attention"])
    torch._dynamo.reset()
    assert worst([torch.compile(model, fullgraph=True, backend="eager")(x).detach()], [expected]) < 1e-12


class Island(ViT):
    """Stable Diffusion's float32 attention in the midst of autocast."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            logits = 100 * torch.einsum("bid,bjd->bij", F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1))
        return self.proj(logits.softmax(-1) @ v)


def test_an_island_of_precision_stays_one():
    model, x = Island(), tokens(torch.float32)
    memopt.apply(model, [AMP()])
    expected = outcome(model, x)
    handle = memopt.apply(model, ["fused_attention"])
    assert worst(outcome(model, x), expected) == 0
    assert "attentions fused" not in handle.report().rows[0].counts


def test_backward_hooks_of_modules_see_what_they_saw():
    model, x, seen = ViT(dropout=0.0).double(), tokens(), []
    model.attn_drop.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    expected = outcome(model, x)
    handle = memopt.apply(model, ["fused_attention"])
    assert worst(outcome(model, x), expected) == 0
    assert torch.equal(*seen)
    assert "not followed because of full backward hooks" in str(handle.report())


def test_softmax_modules_are_found():
    class Lucid(ViT):
        def __init__(self):
            super().__init__()
            self.attend = nn.Softmax(dim=-1)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = torch.matmul(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale), v)
            return self.proj(out.transpose(1, 2).reshape(x.shape))

    model, x = Lucid().double(), tokens()
    expected = outcome(model, x)
    handle = memopt.apply(model, ["fused_attention"])
    assert worst(outcome(model, x), expected) < 1e-12
    assert handle.report().rows[0].counts == {"attentions fused": 1}


@pytest.mark.parametrize("name", ["fused_attention", "outer_product"])
def test_arguments_may_have_any_name(name):
    class Named(ViT):
        def forward(self, x, *, module=1, inner=1, mode=1, check=1, self_=1):
            condition = self.qkv.weight[:2]
            product = torch.einsum("bi,bj->bij", condition, condition).sum()
            return super().forward(x) * module * inner * mode * check + product

    model, x = Named().double(), tokens()
    given = {"module": 2, "inner": 3, "mode": 5, "check": 7}
    expected = model(x, **given)
    memopt.apply(model, [{name: {"check_finite": True}} if name == "outer_product" else name])
    torch.testing.assert_close(model(x, **given), expected, rtol=1e-12, atol=1e-12)


def test_on_the_meta_device():
    model = nn.Sequential(ViT(), ViT()).to("meta")
    memopt.apply(model, ["fused_attention"])
    assert model(torch.empty(2, 33, 24, device="meta")).shape == (2, 33, 24)
