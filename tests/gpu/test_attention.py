"""Outer product and fused attention on a CUDA device. Run on a GPU machine: make gpu."""

import importlib.util

import pytest
import torch
from torch import nn

import memopt
from memopt.ops import rank_one
from memopt.ops.kernels import PACKAGES
from memopt.passes import FusedAttention, OuterProduct
from tests.ops.test_rank_one import arguments, explicit, results
from tests.passes.test_fused_attention import ViT
from tests.test_hae_model import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]


def largest(found, expected):
    pairs = [(a.double().cpu(), b) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(3, 2, 5, 4, 6, 3, 7), (2, 4, 300, 300, 64, 64, 512), (1, 1, 1, 0, 8, 8, 2)])
def test_rank_one_is_as_accurate_as_the_made_tokens(dtype, size):
    exact = arguments(*size, null=(0,))
    given = [x.detach().to(dtype).requires_grad_() for x in exact]
    expected = results(explicit, [x.double() for x in given], 0.3)
    cuda = [x.detach().cuda().requires_grad_() for x in given]
    ours, made = (results(f, cuda, 0.3) for f in (rank_one.attention, explicit))
    assert largest(ours, expected) <= 2 * largest(made, expected) + (1e-10 if dtype == torch.float64 else 1e-6)


def hae_step(model, x, null):
    model.zero_grad()
    n = len(x)
    out = model(x, torch.arange(n, device="cuda"), torch.arange(n, device="cuda") % 3, null=null, clf_free=True)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_hae_is_exact_smaller_and_never_waits():
    torch.manual_seed(0)
    model = make(image_size=32, channel_mult=(2, 4)).cuda().double()
    x, null = torch.randn(4, 2, 32, 32, device="cuda").double(), torch.tensor([True, False, False, True], device="cuda")
    expected = hae_step(model, x, null)

    def peak():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hae_step(model, x, null)
        return torch.cuda.max_memory_allocated() - before

    plain = max(peak(), peak())
    memopt.apply(model, [OuterProduct()])
    hae_step(model, x, null)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = hae_step(model, x, null)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total = torch.stack([b.norm() for b in expected[1:]]).norm()
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12 * total
    assert max(peak(), peak()) < plain


@pytest.mark.parametrize("backend", ["auto", "flash", "efficient", "cudnn", "math", *PACKAGES])
def test_every_kernel_gives_the_attention(backend):
    if backend in PACKAGES and importlib.util.find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"{PACKAGES[backend]} is not installed")
    torch.manual_seed(0)
    model = ViT(width=256, heads=4).cuda().to(torch.bfloat16)
    x = torch.randn(2, 128, 256, device="cuda", dtype=torch.bfloat16)
    exact = ViT(width=256, heads=4).cuda().double()
    exact.load_state_dict(model.state_dict())
    expected = exact(x.double())
    lossy = 5 if backend == "sage" else 1.5
    with torch.no_grad():
        plain = (model(x).double() - expected).abs().max()
        with memopt.apply(model, [FusedAttention(backend=backend)]) as handle:
            assert (model(x).double() - expected).abs().max() <= lossy * plain
            assert handle.report().rows[0].counts == {"attentions fused": 1}


def test_the_profile_predicts_the_peak():
    torch.manual_seed(0)
    model = nn.Sequential(*(ViT(width=256, heads=4) for _ in range(4)))
    x = torch.randn(8, 512, 256)
    predicted = memopt.profile(model, x, passes=["fused_attention"], device="cuda").peak
    model.cuda()
    memopt.apply(model, ["fused_attention"])
    x = x.cuda()
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        model(x).float().mean().backward()
    assert abs(torch.cuda.max_memory_allocated() / predicted - 1) <= 0.03
