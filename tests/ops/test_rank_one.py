"""The D tokens of a squared condition, against the same attention with these tokens made.

All explicit computations are in here; what is tested never sees a D x D or T x D tensor.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

import memopt
from memopt.memory import limit
from memopt.ops import rank_one
from memopt.ops.rank_one import attention, moments

F64 = torch.float64
NAMES = ("q", "k", "v", "c", "u", "w", "b_k", "b_v")


def explicit_moments(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c = c.reshape(len(c), *[1] * (s.ndim - 1), -1)
    logits = s[..., None] * c
    return logits.logsumexp(-1), (logits.softmax(-1) * c).sum(-1)


def explicit(q, k, v, c, u, w, b_k, b_v, scale):
    """With all D keys and values."""
    more_k = u[:, :, None] * c[:, None, :, None] + (0 if b_k is None else b_k[:, None])
    more_v = w[:, :, None] * c[:, None, :, None] + (0 if b_v is None else b_v[:, None])
    k, v = torch.cat([more_k, k], 2), torch.cat([more_v, v], 2)
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def arguments(B=3, H=2, T=5, S=4, d=6, e=3, D=7, dtype=F64, null=(1,), size=1.0) -> list[Tensor]:
    shapes = (B, H, T, d), (B, H, S, d), (B, H, S, e), (B, D), (B, H, d), (B, H, e), (H, d), (H, e)
    q, k, v, c, u, *rest = (torch.randn(shape, dtype=F64) for shape in shapes)
    c[list(null)] = 0
    return [x.to(dtype).requires_grad_() for x in (q, k, v, c, u * size, *rest)]


def results(function, inputs, *more, dtype=None) -> list[Tensor]:
    """The outputs, and the gradients of a weighted sum of them, computed in `dtype`."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*inputs, *more)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=F64).to(y.dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, weights))


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    size = max(float(x.detach().abs().max()) for x in theirs if x.numel())
    for a, b in zip((x.detach() for x in ours), (x.detach() for x in theirs), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            # A gradient may be all rounding (of b_k without plain tokens, say): then the size of the others counts.
            assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-2 * size)


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(rank_one, "SCRATCH_CPU", size)


SHAPES = {
    "conditional": {"null": ()},
    "mixed": {},
    "null": {"null": (0, 1, 2)},
    "one token": {"D": 1},
    "one query": {"T": 1},
    "no plain tokens": {"S": 0},
    "one sample": {"B": 1, "null": ()},
    "wide": {"d": 8, "e": 16},
    "large logits": {"size": 300.0},
}


class TestMoments:
    @pytest.mark.parametrize("chunk", [1, 500, 1 << 20])
    @pytest.mark.parametrize("shape", [(3,), (3, 11), (3, 2, 5)])
    @pytest.mark.parametrize("D", [1, 9])
    @pytest.mark.parametrize("size", [1.0, 1e3])
    def test_agrees(self, monkeypatch, chunk, shape, D, size):
        small_chunks(monkeypatch, chunk)
        s, c = torch.randn(shape, dtype=F64) * size, torch.randn(3, D, dtype=F64)
        c[1] = 0
        # Where exp(s c) leaves one token alone, the explicit weights themselves are off by s c times the precision.
        same(results(moments, [s, c]), results(explicit_moments, [s, c]), 1e-12 * max(1, size / 100))

    def test_null_is_exact(self):
        s = (torch.randn(2, 50) * 1e4).requires_grad_()
        log_sum, mean = moments(s, torch.zeros(2, 512))
        assert torch.equal(log_sum, torch.full((2, 50), 512.0).log())
        assert torch.equal(mean, torch.zeros(2, 50))
        for result in (log_sum, mean):
            assert torch.equal(torch.autograd.grad(result.sum(), s, retain_graph=True)[0], torch.zeros(2, 50))

    def test_far_logits(self):
        s = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True)
        c = torch.tensor([[-2.0, 1.0, 3.0]], requires_grad=True)
        log_sum, mean = moments(s, c)
        assert torch.equal(mean[0, :2], torch.tensor([3.0, -2.0]))
        assert torch.allclose(log_sum, torch.tensor([[3e30, 2e30, math.log(3)]]))
        assert all(x.isfinite().all() for x in torch.autograd.grad((log_sum / 1e30 + mean).sum(), [s, c]))

    @pytest.mark.parametrize("chunk", [1, 3000])
    @pytest.mark.parametrize("which", [slice(0, 2), slice(0, 1), slice(1, 2)])
    def test_gradients(self, monkeypatch, chunk, which):
        small_chunks(monkeypatch, chunk)
        s, c = torch.randn(3, 2, 3, dtype=F64) * 2, torch.randn(3, 5, dtype=F64)
        c[2] = 0
        inputs = s.requires_grad_(), c.requires_grad_()
        assert gradcheck(lambda *x: moments(*x)[which], inputs)
        assert gradgradcheck(lambda *x: moments(*x)[which], inputs)

    def test_third_derivative_is_refused(self):
        s, c = torch.randn(1, 2, requires_grad=True), torch.randn(1, 3, requires_grad=True)
        first = torch.autograd.grad(moments(s, c)[0].sum(), s, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), s, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"rank_one_moments_twice.* no autograd formula"):
            torch.autograd.grad(second.sum(), s)

    @pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0), (3, 2, 0)])
    def test_empty(self, shape):
        s, c = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 4, requires_grad=True)
        log_sum, mean = moments(s, c)
        assert log_sum.shape == mean.shape == s.shape
        to_s, to_c = torch.autograd.grad((log_sum + mean).sum(), [s, c])
        assert to_s.shape == s.shape
        assert torch.equal(to_c, torch.zeros_like(c))

    def test_strides(self, monkeypatch):
        small_chunks(monkeypatch, 200)
        s, c = torch.randn(5, 3, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
        s, c = s.permute(1, 2, 0)[:, ::2], c[::2].expand(3, 4)
        assert not s.is_contiguous()
        assert not c.is_contiguous()
        same(results(moments, [s, c]), results(explicit_moments, [s, c]))
        same(results(moments, [s, c[:1].expand(3, 4)]), results(explicit_moments, [s, c[:1].expand(3, 4)]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_is_computed_in_float32(self, dtype):
        s, c = torch.randn(2, 30).to(dtype), torch.randn(2, 40).to(dtype)
        ours, exact = results(moments, [s, c]), results(moments, [s, c], dtype=torch.float32)
        assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, exact, strict=True))

    @pytest.mark.parametrize(("size", "offset"), [(1, 0), (100, 0), (1000, 0), (1, 10)])
    def test_float32_is_as_good_as_explicit(self, size, offset):
        s, c = torch.randn(2, 300) * size, torch.randn(2, 128) + offset
        as_good(moments, explicit_moments, [s, c])

    def test_autocast_changes_nothing(self):
        s, c = torch.randn(2, 30), torch.randn(2, 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = results(moments, [s, c])
        assert all(map(torch.equal, inside, results(moments, [s, c])))

    def test_kept(self):
        s, c = torch.randn(2, 4, 300).requires_grad_(), torch.randn(2, 40).requires_grad_()
        kept = []
        with saved_tensors_hooks(kept.append, lambda x: x):
            _, mean = moments(s, c)
        assert [x.data_ptr() for x in kept] == [s.data_ptr(), c.data_ptr(), mean.data_ptr()]

    @pytest.mark.parametrize("operator", ["_moments", "_backward", "_twice"])
    @pytest.mark.parametrize("T", [10, 3000])
    def test_scratch(self, operator, T):
        B, H, D, F4 = 4, 2, 512, 4
        s, c = torch.randn(B, H, T), torch.randn(B, D)
        inputs = {"_moments": [s, c], "_backward": [s, c, s, s, s], "_twice": [s, c, s, s, s, s, c]}[operator]
        results = (3 if operator == "_twice" else 2) * B * H * T * F4
        with limit(2 << 30, inputs) as used:
            start = used.total
            getattr(rank_one, operator)._init_fn(*inputs)
        # What has one number per query is small next to D of them: there are a few of these for each chunk.
        per_query = 10 * min(B * H * T, rank_one.SCRATCH_CPU // (D * F4)) * F4
        assert used.peak - start <= results + rank_one.SCRATCH_CPU + per_query + 6 * B * D * F4

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_reads_no_values(self, device):
        """Fake and meta tensors have none: what needs one raises."""
        with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
            s, c = torch.empty(3, 2, 5000, device=device), torch.empty(3, 512, device=device)
            for x in rank_one._moments._init_fn(s, c):
                assert x.shape == s.shape
            for x, y in zip(rank_one._backward._init_fn(s, c, s, s, s), (s, c), strict=True):
                assert (x.shape, x.device) == (y.shape, y.device)
            assert len(rank_one._twice._init_fn(s, c, s, s, s, s, c)) == 4

    @pytest.mark.parametrize(("s", "c"), [((), (3, 4)), ((3,), (4,)), ((3,), (3, 0))])
    def test_shapes_are_checked(self, s, c):
        with pytest.raises(ValueError, match=r"s must be \[B, \.\.\.\] and c \[B, D\] with D > 0, not \["):
            moments(torch.zeros(s), torch.zeros(c))

    def test_batches_are_checked(self):
        with pytest.raises(RuntimeError, match="s has 2 samples, c has 3"):
            moments(torch.zeros(2, 5), torch.zeros(3, 4))

    def test_operators(self):
        """Fake results like true ones, gradients registered, nothing aliased."""
        s, c = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, requires_grad=True)
        x = s.detach().requires_grad_()
        torch.library.opcheck(rank_one._moments, (s, c))
        torch.library.opcheck(rank_one._backward, (s, c, s.detach(), x, x))
        q, lines = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 5, 2, requires_grad=True)
        torch.library.opcheck(rank_one._query, (q, lines, c, 8, 1.5))


def as_good(ours, theirs, inputs, *more) -> None:
    """The error against float64 is at most twice that of the explicit computation in the inputs' type."""
    exact = results(theirs, inputs, *more, dtype=F64)
    for a, b, x in zip(results(ours, inputs, *more), results(theirs, inputs, *more), exact, strict=True):
        precision = torch.finfo(b.dtype).eps / 4  # where theirs is better than rounding the result would be
        assert float((a.to(F64) - x).norm()) <= 2 * max(float((b.to(F64) - x).norm()), precision * float(x.norm()))


class TestAttention:
    @pytest.mark.parametrize("case", SHAPES)
    def test_agrees(self, case):
        inputs = arguments(**SHAPES[case])
        # Large logits: see the moments.
        tolerance = 1e-11 if case == "large logits" else 1e-12
        same(results(attention, inputs, 0.4), results(explicit, inputs, 0.4), tolerance)

    @pytest.mark.parametrize("scale", [64**-0.5, 1.0, 3.0, 1e-3])
    def test_scales(self, scale):
        inputs = arguments()
        same(results(attention, inputs, scale), results(explicit, inputs, scale))

    @pytest.mark.parametrize("missing", [(6,), (7,), (6, 7)])
    def test_no_bias(self, missing):
        def without(function):
            def call(*inputs):
                rest = iter(inputs)
                return function(*[None if i in missing else next(rest) for i in range(8)], 0.4)

            return call

        inputs = [x for i, x in enumerate(arguments()) if i not in missing]
        same(results(without(attention), inputs), results(without(explicit), inputs))

    def test_strides(self):
        """As an attention block has them: one tensor, channels before positions, cut in three."""
        q, k, v = torch.randn(3, 2, 3 * 6, 5, dtype=F64).mT.chunk(3, dim=-1)
        inputs = [q, k, v, *arguments(e=6)[3:]]
        same(results(attention, inputs, 0.4), results(explicit, inputs, 0.4))

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (0, 2, 3, 1), (0, 3, 1, 2)])
    def test_any_layout_is_fused(self, order):
        """Torch's fused kernels want the channels innermost, and it falls back to T x S weights where they are not."""
        q, k, v, *rest = arguments(T=50, S=40)
        back = [order.index(i) for i in range(4)]
        inputs = [*(x.detach().permute(order).contiguous().permute(back) for x in (q, k, v)), *rest]
        kept = []
        with saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)), lambda x: None):
            attention(*(x.requires_grad_() for x in inputs), 0.4)
        assert not [shape for shape in kept if shape[-2:] == (50, 41)]
        same(results(attention, inputs, 0.4), results(explicit, inputs, 0.4))

    @pytest.mark.parametrize(("B", "T"), [(0, 5), (3, 0)])
    def test_empty(self, B, T):
        out, *gradients = results(attention, arguments(B=B, T=T, null=()), 0.4)
        assert out.shape == (B, 2, T, 3)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)

    @pytest.mark.parametrize("S", [0, 3])
    def test_gradients(self, S):
        inputs = arguments(B=2, H=1, T=2, S=S, d=2, e=2, D=3)
        assert gradcheck(lambda *x: attention(*x, 0.7), inputs)
        with sdpa_kernel(SDPBackend.MATH):
            assert gradgradcheck(lambda *x: attention(*x, 0.7), inputs)

    @pytest.mark.parametrize("size", [1.0, 5.0, 30.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_as_good_as_explicit(self, dtype, size):
        inputs = arguments(B=2, T=64, S=48, d=32, e=32, D=128, null=(0,), dtype=dtype, size=size)
        as_good(attention, explicit, inputs, 32**-0.5)

    def test_float16_range(self):
        """Logits of some thousands, whose sum with channels' products fits only if the scale is shared out."""
        inputs = arguments(B=2, T=9, d=64, e=64, D=16, dtype=torch.float16, size=1000.0)
        assert float((inputs[0].detach().float() @ inputs[4].detach().float()[..., None]).abs().max()) > 1e4
        assert all(x.isfinite().all() for x in results(attention, inputs, 1 / 8)[:1])

    def test_mixed_types(self):
        """Statistics in float32 also where only the weights are."""
        inputs = arguments(dtype=torch.bfloat16)
        inputs = [*inputs[:4], *(x.float() for x in inputs[4:])]
        out, *gradients = results(attention, inputs, 0.4)
        assert out.dtype == torch.bfloat16
        assert [x.dtype for x in gradients] == [x.dtype for x in inputs]

    def test_autocast(self):
        inputs = arguments(dtype=torch.float32, null=())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = results(attention, inputs, 0.4)  # its backward, too
        halves = [x.to(torch.bfloat16) for x in inputs[:3]] + inputs[3:]
        outside = results(attention, halves, 0.4)
        assert inside[0].dtype == torch.bfloat16
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(inside, outside, strict=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(*arguments(), 0.4).dtype == F64

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
    def test_kept(self, dtype, size):
        B, H, T, S, d, e, D = 2, 3, 70, 50, 16, 8, 40
        width, fixed = 24, torch.float32.itemsize
        module = Attention(arguments(B, H, T, S, d, e, D, dtype=dtype))
        fake = memopt.profile(module, {}, loss=lambda y: y.sum())
        real = memopt.profile(module, {}, loss=lambda y: y.sum(), real=True)
        assert fake.kept == real.kept
        wide = 2 * B * H * T * width + 2 * B * H * (S + 1) * width  # queries, results, keys, values
        shares = B * H * T * 2 + B * H * 2 * e
        statistics = 2 * B * H * T + 2 * B * H * d  # log-sum-exp of the kernel, m; u and b_k
        assert real.kept == (wide + shares) * size + statistics * fixed

    def test_nothing_large_is_saved(self):
        """Also by the explicit size of it: D is far above all others here."""
        inputs = arguments(B=2, H=2, T=30, S=20, d=8, e=8, D=4000, dtype=torch.float32)
        kept = []
        with saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().nbytes() // 4), lambda x: None):
            attention(*inputs, 0.4)
        assert max(kept) < 4000 * 8  # not D x d of a single head
        assert 2 * 4000 in kept  # c itself

    @pytest.mark.parametrize("dynamic", [True, None])
    def test_compiled(self, dynamic):
        torch._dynamo.reset()
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for B, T, S, scale in ((3, 5, 4, 0.4), (5, 6, 7, 0.4), (2, 6, 7, 0.25)):
            inputs = arguments(B, T=T, S=S)
            same(results(compiled, inputs, scale), results(attention, inputs, scale), 1e-14)

    def test_compiled_once_for_all_batches(self):
        torch._dynamo.reset()
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        for B in (3, 5, 2, 7):
            inputs = arguments(B)
            for x in inputs[:6]:
                torch._dynamo.mark_dynamic(x, 0)
            same([compiled(*inputs, 0.4)], [attention(*inputs, 0.4)], 1e-14)
        assert len(graphs) == 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported(self, strict):
        inputs = [x.detach() for x in arguments()]
        batch = torch.export.Dim("batch")
        shapes = {"inputs": (*[{0: batch}] * 6, {}, {})}
        program = torch.export.export(Call(), tuple(inputs), dynamic_shapes=shapes, strict=strict)
        assert sum("rank_one_query" in str(node.target) for node in program.graph.nodes) == 1
        inputs = arguments(B=5)
        same(results(program.module(), inputs), results(attention, inputs, 0.4), 1e-14)

    def test_fake(self):
        with FakeTensorMode():
            out, *gradients = results(attention, arguments(null=(), dtype=torch.bfloat16), 0.4)
        assert out.shape == (3, 2, 5, 3)
        assert [x.shape for x in gradients] == [x.shape for x in arguments()]


class Attention(nn.Module):
    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.inputs = nn.ParameterList(inputs)

    def forward(self) -> Tensor:
        return attention(*self.inputs, 0.4)


class Call(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return attention(*inputs, 0.4)
