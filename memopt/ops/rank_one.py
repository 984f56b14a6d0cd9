"""Attention over many tokens that all lie on one line, at the cost of a single token.

A condition c (D numbers per sample) is squared to c (x) c and read as D tokens: a linear map makes of token l the key
u c_l + b_k and the value w c_l + b_v. A query q therefore sees them only through the number s = scale q.u:

    logit of token l           s c_l + scale q.b_k
    log-sum-exp of all D       F(s) + scale q.b_k,    F(s) = log sum_l exp(s c_l)
    their weighted value       m(s) w + b_v,          m(s) = F'(s) = sum_l c_l exp(s c_l) / sum_l exp(s c_l)

F is the cumulant generating function of c (up to the constant log D), m the mean of c under weights tilted by s, and
further derivatives are further cumulants: dm/ds is the variance. Where c = 0 this gives F = log D and m = 0, so samples
without a condition need no case of their own. The derivation is this project's.

The D tokens then enter the softmax over the plain ones as one token with logit F(s) + scale q.b_k. To need no kernel of
our own, heads are widened: queries carry that logit in new channels in which the one extra key is not zero, and the
values' new channel, 1 for the extra token alone, brings out the weight p that the D tokens got. The result is the plain
part + p (m w + b_v). No mask is used, so every fused kernel will do. Nothing with D x D or T x D elements is made,
except chunk by chunk in at most 1 MiB of scratch buffers (8 MiB on accelerators).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Bytes for all scratch buffers of a call together (one row of D numbers each, if that is more): what stays in a CPU's
# cache, and what keeps an accelerator's kernels busy for longer than their launch takes.
SCRATCH_CPU, SCRATCH_ELSEWHERE = 1 << 20, 8 << 20
ALIGNMENT = 8  # fused kernels want the channels of a head in multiples of this


def moments(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """F(s) = log sum_l exp(s c_l) and m(s) = dF/ds for each s.

    Kept for backward are s, c and m alone. Differentiable twice; so is `attention`, if torch's attention is (``MATH``).

    Args:
        s: [B, ...]; large values of either sign are no problem.
        c: [B, D], D > 0.

    Returns:
        F and m, shaped like s, in float32 or, if an argument is, in float64. The arithmetic is done in that type, too,
        elementwise: neither autocast nor settings for matrix products (TF32) touch it.
    """
    if c.ndim != 2 or s.ndim == 0 or c.shape[1] == 0:
        raise ValueError(f"s must be [B, ...] and c [B, D] with D > 0, not {list(s.shape)} and {list(c.shape)}")
    torch._check(s.shape[0] == c.shape[0], lambda: f"s has {s.shape[0]} samples, c has {c.shape[0]}")
    log_sum, mean = _moments(s, c)
    return log_sum, mean


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    u: Tensor,
    w: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax attention of q over D tokens with keys u c_l + b_k and values w c_l + b_v, and S plain ones.

    As exact as making these D tokens would be. Under autocast it runs in autocast's type, as fused attention does; the
    statistics are in float32 in any case.

    Args:
        q: [B, H, T, d].
        k: [B, H, S, d]; S may be 0.
        v: [B, H, S, e].
        c: [B, D].
        u: [B, H, d].
        w: [B, H, e].
        b_k: [H, d], or None for zero.
        b_v: [H, e], or None for zero.
        scale: what products of queries and keys are multiplied with; positive.

    Returns:
        [B, H, T, e].
    """
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    d, e = q.shape[-1], v.shape[-1]
    width = -(-max(d + 2, e + 1) // ALIGNMENT) * ALIGNMENT
    b_k = torch.zeros_like(u) if b_k is None else b_k.expand_as(u)
    b_v = torch.zeros_like(w) if b_v is None else b_v.expand_as(w)
    # The logit is a product of two channels and scale. A power of two about 1 / scale in the key is exact and leaves
    # the query's channel about as large as the logit itself, far from the end of float16's range.
    unit = 2.0 ** -math.frexp(scale)[1]
    lines = torch.stack([u, b_k], dim=-1).to(_wide(q, c)) * scale
    query, mean = _query(q, lines, c, width, 1 / (scale * unit))
    key, value = _extend(k, width, unit, 2), _extend(v, width, 1.0, 1)
    mixed = scaled_dot_product_attention(query, key, value, scale=scale)
    share = mixed[..., e]
    weights = torch.stack([(share * mean).to(q.dtype), share], dim=-1)
    out: Tensor = mixed[..., :e] + weights @ torch.stack([w, b_v], dim=-2).to(q.dtype)
    return out


def _extend(x: Tensor, width: int, entry: float, entries: int) -> Tensor:
    """Keys or values with zeros as new channels, and one more token that has `entries` entries in these only."""
    size = x.shape[-1]
    token = pad(x.new_full((*x.shape[:2], 1, entries), entry), (size, width - size - entries))
    return torch.cat([pad(x, (0, width - size)), token], dim=2)


def _query_gradients(ctx: Any, to_query: Tensor, to_mean: Tensor) -> tuple[Tensor | None, ...]:
    query, lines, c, mean = ctx.saved_tensors
    with torch.autocast(query.device.type, enabled=False):
        d = lines.shape[-2]
        q = query[..., :d].to(lines.dtype)
        to_logit = to_query[..., d, None].to(lines.dtype) * ctx.gain
        to_s, to_c = _backward(q @ lines[..., :1], c, mean[..., None], to_logit, to_mean[..., None])
        to_both = torch.cat([to_s, to_logit], dim=-1)
        to_q = to_query[..., :d] + (to_both @ lines.mT).to(query.dtype)
        return to_q, q.mT @ to_both, to_c, None, None


def _keep_query(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, lines, c, _, ctx.gain = inputs
    ctx.save_for_backward(output[0], lines, c, output[1])


# Operators rather than Functions, so that compiled and exported graphs hold one node for each, whatever the number of
# chunks, and chunks are counted in real sizes.


@torch.library.custom_op("memopt::rank_one_query", mutates_args=())
def _query(q: Tensor, lines: Tensor, c: Tensor, width: int, gain: float) -> tuple[Tensor, Tensor]:
    """Queries widened by the logit of the D tokens, in two channels, and the mean m.

    An operator so that only its results are kept, the first of which the attention keeps anyhow: not q, which is often
    a view that would keep the keys and values alive as well, and not s.
    """
    with torch.autocast(q.device.type, enabled=False):
        s, bias = (q.to(lines.dtype) @ lines).unbind(-1)
    log_sum, mean = _moments(s, c)
    logit = (log_sum + bias).mul_(gain)[..., None]
    # In half precision one channel would round the logit: the second takes the rest.
    high = logit.to(q.dtype)
    low = (logit - high).to(q.dtype)
    return torch.cat([q, high, low, q.new_zeros(*q.shape[:-1], width - q.shape[-1] - 2)], dim=-1), mean


@torch.library.custom_op("memopt::rank_one_moments", mutates_args=())
def _moments(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    log_sum, mean = (s.new_empty(s.shape, dtype=_wide(s, c)) for _ in range(2))
    for _, (x, f, m), y, top, (e,) in _chunks(c, [s, log_sum, mean]):
        total = e.sum(-1, keepdim=True)
        torch.add(total.log(), x * top, out=f)
        torch.div(e.mul_(y).sum(-1, keepdim=True), total, out=m)
    return log_sum, mean


@torch.library.custom_op("memopt::rank_one_moments_backward", mutates_args=())
def _backward(s: Tensor, c: Tensor, mean: Tensor, to_f: Tensor, to_m: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients of F and m, with p_l = exp(s c_l - F) and v = sum_l p_l (c_l - m)^2:

    of s: to_f m + to_m v; of c_l: the sum over queries of p_l (to_f s + to_m (1 + s (c_l - m))).
    """
    to_s, to_c = mean.new_empty(s.shape), mean.new_zeros(c.shape)
    for at, (x, m, gf, gm, out), y, _, (p, d) in _chunks(c, [s, mean, to_f, to_m, to_s], buffers=2):
        total = p.sum(-1, keepdim=True)
        torch.sub(y, m, out=d).mul_(p)
        rounding = d.sum(-1, keepdim=True) / total  # of m: matters for large s or c far from 0
        slope = gm * x
        p.mul_((gf * x + gm - slope * rounding) / total).addcmul_(d, slope / total)
        to_c[at] += p.sum(1)
        variance = d.mul_(torch.sub(y, m, out=p)).sum(-1, keepdim=True) / total
        torch.addcmul(gf * m, gm, variance, out=out)
    return to_s.to(s.dtype), to_c.to(c.dtype)


@torch.library.custom_op("memopt::rank_one_moments_twice", mutates_args=())
def _twice(
    s: Tensor, c: Tensor, mean: Tensor, to_f: Tensor, to_m: Tensor, to_to_s: Tensor, to_to_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `_backward`'s s, c (m's share is in these two), to_f and to_m. Rare, so not tuned for speed."""
    of_s, of_f, of_m = (mean.new_empty(s.shape) for _ in range(3))
    of_c = mean.new_zeros(c.shape)
    parts = [s, mean, to_f, to_m, to_to_s, of_s, of_f, of_m]
    for at, (x, m, gf, gm, a, out_s, out_f, out_m), y, _, (p,) in _chunks(c, parts, temporaries=9):
        p /= p.sum(-1, keepdim=True)
        b = to_to_c[at, None].to(p.dtype)
        average = (p * b).sum(-1, keepdim=True)
        d, b = y - m, b - average
        pd, pb = p * d, p * b
        variance, covariance = (pd * d).sum(-1, keepdim=True), (pb * d).sum(-1, keepdim=True)
        out_f.copy_(a * m + x * average)
        out_m.copy_(a * variance + average + x * covariance)
        third, mixed = (pd * d).mul_(d).sum(-1, keepdim=True), (pd * d).mul_(b).sum(-1, keepdim=True)
        out_s.copy_(gf * out_m + gm * (a * third + 2 * covariance + x * mixed))
        linear = p * (gf * a - gm * x * (a * variance + x * covariance))
        linear += pd * (a * (gf * x + 2 * gm)) + pb * (x * (gf * x + 2 * gm))
        of_c[at] += (linear + pd * d * (gm * a * x) + pb * d * (gm * x * x)).sum(1)
    return of_s.to(s.dtype), of_c.to(c.dtype), of_f, of_m


def _chunks(
    c: Tensor, parts: list[Tensor], buffers: int = 1, temporaries: int = 0
) -> Iterator[tuple[slice, list[Tensor], Tensor, Tensor, list[Tensor]]]:
    """Walk over the queries, with exp(s c) in a buffer that is used again for the next chunk.

    Args:
        c: [B, D].
        parts: s and others like it, [B, ...].
        buffers: how many are needed.
        temporaries: how many tensors as large as a buffer the caller makes besides.

    Yields:
        The samples' slice; of each part its [b, n, 1]; c as [b, 1, D]; the extreme c_l where s c_l is largest,
        [b, n, 1]; buffers [b, n, D], the first of them with exp(s (c - extreme)).
    """
    wide = _wide(parts[0], c)
    batch, count, size = c.shape[0], math.prod(parts[0].shape[1:]), c.shape[1]
    budget = SCRATCH_CPU if c.device.type == "cpu" else SCRATCH_ELSEWHERE
    rows = max(1, budget // (size * wide.itemsize * (buffers + temporaries)))
    queries = min(rows, max(1, count))
    samples = max(1, rows // queries)
    scratch = c.new_empty(buffers, min(samples, batch) * queries * size, dtype=wide)
    parts = [part.reshape(batch, count, 1) for part in parts]
    c = c.to(wide)[:, None]
    low, high = c.aminmax(dim=-1, keepdim=True)
    for first in range(0, batch, samples):
        at = slice(first, first + samples)
        for start in range(0, count, queries):
            here = [part[at, start : start + queries].to(wide) for part in parts]
            x, y = here[0], c[at]
            top = torch.where(x < 0, low[at], high[at])
            shape = (x.shape[0], x.shape[1], size)
            free = [row[: math.prod(shape)].view(shape) for row in scratch]
            torch.sub(y, top, out=free[0]).mul_(x).exp_()
            yield at, here, y, top, free


def _wide(*tensors: Tensor) -> torch.dtype:
    """The type of the statistics."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    # Of the first operator's results m, not F: weights of a chunk are made to sum to 1 again, which is exacter, too.
    ctx.save_for_backward(*inputs, *output[1:2] * (len(inputs) == 2))


def _moments_gradients(ctx: Any, to_f: Tensor, to_m: Tensor) -> tuple[Tensor, Tensor]:
    to_s, to_c = _backward(*ctx.saved_tensors, to_f, to_m)
    return to_s, to_c


def _backward_gradients(ctx: Any, to_to_s: Tensor, to_to_c: Tensor) -> tuple[Tensor | None, ...]:
    of_s, of_c, of_f, of_m = _twice(*ctx.saved_tensors, to_to_s, to_to_c)
    return of_s, of_c, None, of_f, of_m


_query.register_fake(
    lambda q, lines, c, width, gain: (q.new_empty(*q.shape[:-1], width), lines.new_empty(q.shape[:-1]))
)
_moments.register_fake(lambda s, c: tuple(s.new_empty(s.shape, dtype=_wide(s, c)) for _ in range(2)))
_backward.register_fake(lambda s, c, *_: (s.new_empty(s.shape), c.new_empty(c.shape)))
_twice.register_fake(lambda s, c, mean, *_: tuple(x.new_empty(x.shape) for x in (s, c, mean, mean)))
_query.register_autograd(_query_gradients, setup_context=_keep_query)
_moments.register_autograd(_moments_gradients, setup_context=_keep)
_backward.register_autograd(_backward_gradients, setup_context=_keep)
