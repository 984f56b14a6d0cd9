"""The algebra of deferred values: what it knows is exact, and what it does not know is given the tensor, bit by bit."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memopt.deferred import Attentions, Products, counting, made, watched

N, D, T, C, HEADS = 3, 10, 5, 8, 2


def inputs(dtype=torch.float64):
    """c, another condition d, a weight for either factor, a bias, plain tokens; one row of c is zero."""
    generator = torch.Generator().manual_seed(5)
    shapes = (N, D), (N, D), (2 * C, D), (2 * C,), (N, T, 3 * C)
    c, *rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    c[1] = 0
    return [x.to(dtype).requires_grad_() for x in (c, *rest)]


def outcome(function, given, mode=None):
    """The result of a function, the gradients of all inputs, and what was told."""
    given = [x.detach().clone().requires_grad_(x.requires_grad) for x in given]
    counts = Counter()
    if mode is None:
        result = function(*given)
    else:
        with mode(counting(counts)), watched():
            result = made(function(*given))
    grads = [None] * len(given)
    if isinstance(result, Tensor) and result.requires_grad:
        weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        grads = torch.autograd.grad(result, given, weight.to(result.dtype), allow_unused=True)
    return result, grads, counts


def assert_exact(function, given=None, mode=Products, tolerance=1e-12):
    given = inputs() if given is None else given
    expected, expected_grads, _ = outcome(function, given)
    found, grads, counts = outcome(function, given, mode)
    size = max(float(g.abs().max()) for g in expected_grads if g is not None)
    for a, b in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert float((a - b).detach().abs().max()) <= tolerance * max(float(b.detach().abs().max()), 1e-3 * size)
    return counts


# What is known.

PRODUCTS = {
    "einsum": lambda c, d: torch.einsum("ab,ac->abc", c, d),
    "einsum swapped": lambda c, d: torch.einsum("nj,ni->nij", d, c),
    "einsum with spaces": lambda c, d: torch.einsum("b i, b j -> b i j", c, d),
    "mul": lambda c, d: c[:, :, None] * d[:, None, :],
    "mul swapped": lambda c, d: d.unsqueeze(1) * c.unsqueeze(2),
    "torch.mul": lambda c, d: torch.mul(c.unsqueeze(-1), d.unsqueeze(-2)),
    "bmm": lambda c, d: torch.bmm(c.unsqueeze(2), d.unsqueeze(1)),
    "matmul": lambda c, d: torch.matmul(c[..., None], d[:, None]),
    "@": lambda c, d: c[:, :, None] @ d[:, None, :],
}
MAPS = {  # [N, D, 2C]
    "conv1d": lambda M, w, b: F.conv1d(M, w[:, :, None], b).transpose(1, 2),
    "conv1d without bias": lambda M, w, b: F.conv1d(M, w[:, :, None]).permute(0, 2, 1),
    "conv1d by keyword": lambda M, w, b: F.conv1d(M, w[:, :, None], bias=b, stride=1, padding=[0]).mT,
    "linear": lambda M, w, b: F.linear(M, w, b),
    "linear of the transposed": lambda M, w, b: F.linear(M.transpose(1, 2), w, b),
    "linear of mT": lambda M, w, b: F.linear(M.mT, w),
    "matmul": lambda M, w, b: M @ w.t(),
    "matmul from the left": lambda M, w, b: (w @ M).swapaxes(1, 2),
    "bmm": lambda M, w, b: torch.bmm(M, w.t().expand(N, D, 2 * C)),
    "einsum of columns": lambda M, w, b: torch.einsum("nij,fi->njf", M, w),
    "einsum of rows": lambda M, w, b: torch.einsum("f j, n i j -> n i f", w, M),
    "scaled": lambda M, w, b: F.linear((0.5 * M) / 4 * 3.0, w, b),
    "cast": lambda M, w, b: F.linear(M.to(torch.float64).double().to(w).type_as(w).to(dtype=w.dtype), w, b),
    "cast to a device": lambda M, w, b: F.linear(M.to("cpu").to(w.device, w.dtype, non_blocking=True), w, b),
}


def plain(x):
    """Queries, keys and values of the plain tokens, [N, T, C] each."""
    return x.chunk(3, dim=-1)


def heads_of(x):
    return x.reshape(N, -1, HEADS, C // HEADS)


def joined(x, more, order="before"):
    """Queries, and keys and values of the plain tokens together with more, [N, S, 2C]."""
    q, *kv = plain(x)
    parts = {
        "before": lambda new, old: torch.cat([new, old], dim=1),
        "after": lambda new, old: torch.cat((old, new), 1),
        "between": lambda new, old: torch.cat([old[:, :2], new, old[:, 2:]], dim=1),
        "twice": lambda new, old: torch.cat([torch.cat([old[:, :2], new], dim=1), old[:, 2:]], dim=1),
        "only": lambda new, old: new,
    }
    return q, *map(parts[order], more.chunk(2, dim=-1), kv)


def by_matmul(q, k, v):
    """[B, H, T, d]."""
    q, k, v = (heads_of(x).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(N, -1, C)


def by_bmm(q, k, v):
    """[B*H, T, d], the scale on the queries."""
    q, k, v = (heads_of(x).permute(0, 2, 1, 3).reshape(N * HEADS, -1, C // HEADS) for x in (q, k, v))
    return torch.bmm(torch.bmm(q / 2, k.transpose(1, 2)).softmax(-1), v)


def by_baddbmm(q, k, v):
    """As diffusers' get_attention_scores."""
    q, k, v = (heads_of(x).transpose(1, 2).reshape(N * HEADS, -1, C // HEADS) for x in (q, k, v))
    empty = torch.empty(N * HEADS, q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.5)
    return torch.bmm(F.softmax(scores, dim=-1), v)


def by_einsum(q, k, v):
    """[B, T, H, d], the scale on the keys."""
    q, k, v = map(heads_of, (q, k, v))
    weights = torch.einsum("bthd,bshd->bhts", q, k * 0.5).softmax(dim=-1, dtype=torch.float64).type_as(v)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def by_swapped_einsum(q, k, v):
    """Keys and values first."""
    q, k, v = map(heads_of, (q, k, v))
    weights = (torch.einsum("bshd,bthd->bhts", k, q) / 2).softmax(-1).to(v.dtype)
    return torch.einsum("bshd,bhts->bhtd", v, weights)


def by_einops(q, k, v):
    """One head, spaces in the equation, dropout off."""
    weights = F.dropout((torch.einsum("b i d, b j d -> b i j", q, k) * 0.3).softmax(dim=-1), 0.5, training=False)
    return torch.einsum("b i j, b j d -> b i d", weights, v)


def by_channels(q, k, v):
    """[B*H, d, T], as guided diffusion; the scale on both."""
    q, k, v = (x.transpose(1, 2).reshape(N * HEADS, C // HEADS, -1) for x in (q, k, v))
    weights = torch.einsum("bct,bcs->bts", q * 0.8, k * 0.8).to(q.dtype).softmax(dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(N, C, -1)


def by_split(q, k, v):
    """One head after the other."""
    outs = [
        torch.einsum("bts,bsd->btd", torch.einsum("btd,bsd->bts", q, k).softmax(-1), v)
        for q, k, v in zip(*(heads_of(x).transpose(1, 2).unbind(1) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outs, dim=-1)


LAYOUTS = (by_matmul, by_bmm, by_baddbmm, by_einsum, by_swapped_einsum, by_einops, by_channels, by_split)


def assert_all_by_rank_one(counts):
    assert counts["products not made"] == 1
    assert counts["linear maps by rank one"] == 1
    assert counts["attentions by rank one"] >= 1
    assert not [text for text in counts if text.startswith("made")]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("form", PRODUCTS)
def test_every_form_of_the_product(form, same):
    def function(c, d, w, b, x):
        return by_matmul(*joined(x, F.linear(PRODUCTS[form](c, c if same else d), w, b)))

    assert_all_by_rank_one(assert_exact(function))


@pytest.mark.parametrize("form", MAPS)
def test_every_linear_map(form):
    def function(c, d, w, b, x):
        return by_bmm(*joined(x, MAPS[form](torch.einsum("ab,ac->abc", c, d), w, b)))

    assert_all_by_rank_one(assert_exact(function))


@pytest.mark.parametrize("order", ["before", "after", "between", "twice", "only"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_attention(layout, order):
    def function(c, d, w, b, x):
        return layout(*joined(x, F.linear(torch.einsum("ab,ac->abc", c, c), w, b), order))

    assert_all_by_rank_one(assert_exact(function))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_attention_is_fused(layout):
    def function(x):
        return layout(*plain(x))

    counts = assert_exact(function, inputs()[-1:], Attentions)
    assert set(counts) == {"attentions fused"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_autocast_both_are_found_and_types_are_as_before(layout):
    def function(c, d, w, b, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layout(*joined(x, F.linear(torch.einsum("ab,ac->abc", c, c), w, b)))

    counts = assert_exact(function, inputs(torch.float32), tolerance=0.1)
    assert counts["attentions by rank one"]
    given = inputs(torch.float32)[-1:]

    def attention(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layout(*plain(x))

    assert assert_exact(attention, given, Attentions, 0.1)["attentions fused"]


# What is not known.


def looked_at(M):
    """All that code asks of a tensor without changing it."""
    rows, columns, *_ = M.shape[1:], M.stride()
    facts = (
        *(M.size(0), M.size(-1), M.size(), M.ndim, M.dim(), M.numel(), M.nelement(), len(M), M.dtype, M.device, rows),
        *(columns, M.is_cuda, M.layout, M.is_contiguous(), M.requires_grad, M.is_leaf, M.element_size(), M.itemsize),
        *(M.is_floating_point(), torch.is_floating_point(M), torch.numel(M), M.nbytes, M.grad_fn is None),
        *(f"{M[0, 0, 0]:.3f}", str(M.detach()), repr(M.detach()), hasattr(M, "nonsense"), M.get_device()),
    )
    return torch.tensor([hash(str(fact)) % 1000 for fact in facts], dtype=torch.float64) + M.sum()


UNKNOWN = {
    "sum": lambda M: M.sum(),
    "softmax": lambda M: torch.softmax(M, -1),
    "power": lambda M: M**2 + 2 ** (M / 9),
    "conv1d of 3": lambda M: F.conv1d(M, torch.ones(4, D, 3, dtype=M.dtype), padding=1),
    "conv1d of groups": lambda M: F.conv1d(M, torch.ones(4, 5, 1, dtype=M.dtype), groups=2),
    "conv1d with a stride": lambda M: F.conv1d(M, torch.ones(4, D, 1, dtype=M.dtype), stride=2),
    "plus transposed": lambda M: M + M.mT,
    "minus": lambda M: 1 - M - 2 - M / 3,
    "reversed division": lambda M: 1 / (M + 3.0) + M % 3 + M.detach() // 2,
    "negative": lambda M: -M,
    "positive": lambda M: +M,
    "abs": lambda M: abs(M),
    "cat": lambda M: torch.cat([M, M[:, :2]], dim=1),
    "stack": lambda M: torch.stack([M, M]),
    "slice": lambda M: M[:, 1:3],
    "index": lambda M: M[0],
    "index by a tensor": lambda M: M[M > 0],
    "index by a list": lambda M: M[[0, 2]],
    "rows": lambda M: torch.stack(list(M)),
    "reversed": lambda M: torch.stack(list(reversed(M))),
    "unpacked": lambda M: sum(row.sum() * i for i, (row) in enumerate([*M])),
    "comparison": lambda M: (M > 0) & (M <= 1) | (M < -1) ^ (M >= 2) | ~(M == 0) & (M != 3),
    "returned": lambda M: M,
    "itself times itself": lambda M: M @ M,
    "elementwise square": lambda M: M * M,
    "times a tensor": lambda M: M * torch.arange(D, dtype=M.dtype),
    "from the left": lambda M: torch.arange(D, dtype=M.dtype) + M,
    "with numpy": lambda M: torch.from_numpy(np.asarray(M.detach()) * np.ones(D)),
    "as an array": lambda M: torch.from_numpy(np.array(M.detach().tolist())),
    "linalg": lambda M: torch.linalg.matrix_norm(M),
    "trace": lambda M: torch.einsum("nii->n", M),
    "einsum of three": lambda M: torch.einsum("nij,ni,nj->n", M, M[:, 0], M[:, 1]),
    "einsum of a list": lambda M: torch.einsum("nij,nij->n", [M, M]),
    "out of order": lambda M: M.permute(2, 0, 1),
    "permuted by keyword": lambda M: torch.permute(M, dims=(0, 2, 1)).sum(1),
    "transposed by keyword": lambda M: torch.transpose(input=M, dim0=1, dim1=2),
    "integer": lambda M: M.to(torch.int64) + M.long() + M.int(),
    "truth": lambda M: torch.tensor(bool(M.any()) + float(M[:1, :1, :1].detach()) + sum(map(bool, M[0, 0]))),
    "contains": lambda M: torch.tensor([0.0 in M, 12345.0 in M]),
    "in place": lambda M: M.mul_(2).add_(1),
    "in place, by an operator": lambda M: operators_in_place(M),
    "in place, by index": lambda M: assigned(M),
    "in place, then mapped": lambda M: mapped_after(M, lambda m: m.mul_(2)),
    "in place on a row, then mapped": lambda M: mapped_after(M, lambda m: m[0].mul_(3)),
    "in place on what shares its memory, then mapped": lambda M: mapped_after(M, lambda m: m.mT.mul_(3)),
    "in place without a gradient, then mapped": lambda M: mapped_after(M, lambda m: m.data.mul_(3)),
    "filled": lambda M: M.fill_(2.0),
    "detached": lambda M: M.detach() * 2,
    "a gradient's hook": lambda M: mapped_after(M, lambda m: m.requires_grad and m.register_hook(lambda g: g * 7)),
    "made and mapped": lambda M: mapped_after(M, lambda m: m.sum()),
    "made without gradients, then used": lambda M: made_without_gradients(M) * M.sum(),
    "made under autocast, then used": lambda M: made_under_autocast(M) * M.sum(),
    "apply_along": lambda M: torch.func.vmap(lambda m: m.sum())(M.clone()),
    "a function of autograd": lambda M: Doubled.apply(M),
    "facts": looked_at,
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def operators_in_place(M):
    before = M
    M += 1
    M *= 2
    M -= 3
    M /= 4
    return M + before


def assigned(M):
    M[0] = 5.0
    M[:, 1] = M[:, 2]
    return M


def mapped_after(M, change):
    change(M)
    return F.linear(M, torch.ones(4, D, dtype=M.dtype))


def made_without_gradients(M):
    with torch.no_grad():
        return M.abs().mean()


def made_under_autocast(M):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return M.abs().mean()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("form", ["einsum", "mul"])
@pytest.mark.parametrize("use", UNKNOWN)
def test_what_is_not_known_gets_the_tensor_itself(use, form, trained):
    def function(c, d, *_):
        return UNKNOWN[use](PRODUCTS[form](c, d))

    given = [x.detach().requires_grad_(trained) for x in inputs()]
    expected, expected_grads, _ = outcome(function, given)
    found, grads, counts = outcome(function, given, Products)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert counts["products not made"] == 1
    assert [text for text in counts if text.startswith("made a whole product for ")]


def test_the_reason_is_told():
    counts = Counter()
    with Products(counting(counts)):
        M = torch.einsum("ab,ac->abc", *inputs()[:2])
        M.cumsum(0)
        M.exp()  # it is there already
        F.conv1d(M, torch.ones(4, D, 1, dtype=M.dtype)).relu()
    assert counts["made a whole product for cumsum"] == 1
    assert counts["made a product's linear map for relu"] == 1
    assert not isinstance(M, Tensor)  # known: torch's own code would read memory that is not there
    assert {M: 1}[M] == 1
    with pytest.raises(AttributeError, match="nonsense"):
        _ = M.nonsense
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        F.linear(M, torch.ones(4, D + 1, dtype=M.dtype))


@pytest.mark.parametrize("why", ["first dimension", "letters", "shapes", "types", "integers", "one column"])
def test_other_products_are_left_alone(why):
    c, d, *_ = inputs()
    counts = Counter()
    with Products(counting(counts)):
        result = {
            "first dimension": lambda: torch.einsum("ab,cb->acb", c, d),
            "letters": lambda: torch.einsum("ab,ab->ab", c, d),
            "shapes": lambda: torch.einsum("ab,ac->abc", c[:1], d),
            "types": lambda: c[:, :, None] * d.float()[:, None],
            "integers": lambda: c.long()[:, :, None] * d.long()[:, None],
            "one column": lambda: c[:, :, None] * d[:, None, :1],
        }[why]()
    assert type(result) is Tensor
    assert not counts
