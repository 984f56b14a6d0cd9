"""Attention that is written out, softmax(q k) v, as one fused operation: logits and weights that are not made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.deferred.following import Following
from memopt.deferred.product import Joined, Line, permuted
from memopt.deferred.value import (
    CASTS,
    MATMUL,
    Chain,
    Deferred,
    Tell,
    autocast_dtype,
    cast_of,
    in_autocast,
    is_number,
    parse,
    parse_from,
    rule,
)
from memopt.ops import rank_one
from memopt.ops.kernels import Attend, torch_attention
from memopt.tensors import PLAIN


class Logits(Deferred):
    """Queries times keys, [..., T, S]; any product of matrices looks like that at first.

    Args:
        q: [..., T, d].
        k: [..., S, d], a tensor, a line or joined tokens.
        attend: what is called in the end, if all is tensors.
    """

    def __init__(
        self, q: Tensor, k: Any, scale: float, call: tuple[Any, ...], chain: Chain, attend: Attend = torch_attention
    ) -> None:
        super().__init__((*q.shape[:-1], k.shape[-2]), q, call, chain)
        self.q, self.k, self.scale, self.dtype, self.attend = q, k, scale, autocast_dtype(q), attend


class Weights(Deferred):
    """The softmax of logits over their last dimension."""

    noun = "attention weights"

    def __init__(self, logits: Logits, dtype: torch.dtype, call: tuple[Any, ...]) -> None:
        super().__init__(logits.shape, logits.q, call, logits.chain)
        self.logits, self.dtype = logits, dtype


class Attentions(Following):
    """While active, products that may be those of queries and keys are deferred."""

    def __init__(self, tell: Tell, attend: Attend = torch_attention) -> None:
        super().__init__(tell)
        self.attend = attend

    def begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (func is torch.einsum or func in MATMUL or func is torch.baddbmm) and self.begins:
            tensors = args[1:] if func is torch.einsum else args
            if all(type(x) in PLAIN and x.ndim > 2 for x in tensors):
                logits = _logits(func, args, kwargs, self.chain)
                if logits is not None:
                    logits.attend = self.attend
                    return logits
        return func(*args, **kwargs)


def _logits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], chain: Chain) -> Logits | None:
    """The product of queries and keys that a call makes, or None if it is something else."""
    call, scale = (func, args, kwargs), 1.0
    if func is torch.einsum:
        parsed = parse(args)
        if parsed is None or kwargs:
            return None
        left, right, out = parsed
        of_q, of_k, q, k = (left, right, args[1], args[2]) if out[-1] in right else (right, left, args[2], args[1])
        summed = [letter for letter in of_q if letter in of_k and letter not in out]
        batch = [letter for letter in out if letter in of_q and letter in of_k]
        if len(out) < 3 or len(summed) != 1 or list(out[:-2]) != batch:
            return None
        t, s = list(out[-2:])
        if t not in of_q or t in of_k or s in of_q or {*of_q} != {*batch, t, *summed}:
            return None
        q = permuted(q, [of_q.index(letter) for letter in (*batch, t, *summed)])
        k = permuted(k, [of_k.index(letter) for letter in (*batch, s, *summed)])
    else:
        if func is torch.baddbmm:
            if kwargs.get("beta", 1) != 0 or len(args) != 3 or not kwargs.keys() <= {"alpha", "beta"}:
                return None
            scale, args = float(kwargs.get("alpha", 1)), args[1:]
        elif kwargs:
            return None
        q, k = args
        if q.ndim != k.ndim or q.ndim < 3:
            return None
        k = permuted(k, [*range(k.ndim - 2), k.ndim - 1, k.ndim - 2])
    if q is NotImplemented or k is NotImplemented or not isinstance(q, Tensor) or scale <= 0:
        return None
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        return None
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        return None
    if isinstance(k, (Line, Joined)) and k.axis != k.ndim - 2:
        return None
    return Logits(q, k, scale, call, chain)


@rule(Line, "einsum", "matmul", "bmm", "__matmul__", "baddbmm")
@rule(Joined, "einsum", "matmul", "bmm", "__matmul__", "baddbmm")
def _(func: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(arg, (Logits, Weights)) for arg in args):
        return NotImplemented
    source = next(arg for arg in args if isinstance(arg, (Line, Joined)))
    logits = _logits(func, args, kwargs, source.chain)
    return NotImplemented if logits is None else logits


@rule(Logits, "mul", "div")
def _(func: Any, x: Any, y: Any) -> Any:
    if not isinstance(x, Logits) or not is_number(y) or y <= 0:
        return NotImplemented
    scale = x.scale * y if func.__name__ == "mul" else x.scale / y
    return Logits(x.q, x.k, scale, (func, (x, y), {}), x.chain, x.attend)


@rule(Logits, *CASTS)
def _(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = cast_of(func, x, args, kwargs) if isinstance(x, Logits) else None
    if dtype is None or dtype.itemsize < autocast_dtype(x.q).itemsize:  # a rounding that was asked for
        return NotImplemented
    result = Logits(x.q, x.k, x.scale, (func, (x, *args), kwargs), x.chain, x.attend)
    result.dtype = dtype
    return result


@rule(Logits, "softmax")
def _(func: Any, x: Any, dim: int | None = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Any:
    if isinstance(_stacklevel, torch.dtype):  # third in torch.softmax, fourth in torch.nn.functional's
        dtype = _stacklevel
    if not isinstance(x, Logits) or dim is None or dim % x.ndim != x.ndim - 1:
        return NotImplemented
    given = dtype or x.dtype
    if dtype is None and in_autocast(x.device):  # whose lists differ by device: ask torch
        given = torch.softmax(torch.empty(1, dtype=x.dtype, device=x.device), 0).dtype
    return Weights(x, given, (torch.softmax, (x,), {"dim": dim, "dtype": dtype}))


@rule(Weights, *CASTS)
def _(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = cast_of(func, x, args, kwargs) if isinstance(x, Weights) else None
    if dtype is None or dtype.itemsize < autocast_dtype(x.logits.q).itemsize:
        return NotImplemented
    return Weights(x.logits, dtype, (func, (x, *args), kwargs))


@rule(Weights, "dropout")
def _(func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return x if p == 0 or not training else NotImplemented


@rule(Weights, "einsum")
def _(func: Any, *args: Any) -> Any:
    parsed = parse_from(Weights, args)
    if parsed is None:
        return NotImplemented
    mine, other, out, weights, v = parsed
    *batch, t, s = list(mine)
    e = [letter for letter in other if letter not in mine]
    if isinstance(v, Weights) or len(e) != 1 or {*other} != {*batch, s, *e} or {*out} != {*batch, t, *e}:
        return NotImplemented
    mixed = _attend(weights, permuted(v, [other.index(letter) for letter in (*batch, s, *e)]))
    if mixed is NotImplemented:
        return NotImplemented
    made = [*batch, t, *e]
    return mixed.permute([made.index(letter) for letter in out])


@rule(Weights, "matmul", "bmm", "__matmul__")
def _(func: Any, x: Any, y: Any) -> Any:
    return _attend(x, y) if isinstance(x, Weights) and not isinstance(y, Weights) else NotImplemented


def _attend(weights: Weights, v: Any) -> Any:
    """The attention of queries over keys with these values [..., S, e]: [..., T, e]."""
    logits = weights.logits
    q, k = logits.q, logits.k
    if v is NotImplemented or v.shape[:-1] != k.shape[:-1]:
        return NotImplemented
    autocast = in_autocast(q.device) and torch.float64 not in (q.dtype, k.dtype, v.dtype)
    if not autocast and not weights.dtype == q.dtype == k.dtype == v.dtype:
        return NotImplemented
    if isinstance(k, Tensor) and isinstance(v, Tensor):
        logits.chain.tell("attentions fused")
        batch = q.shape[:-2]
        q, k, v = (_as_heads(x) for x in (q, k, v))
        return logits.attend(q, k, v, logits.scale).reshape(*batch, q.shape[-2], v.shape[-1])
    return _attend_to_line(q, k, v, logits)


def _as_heads(x: Tensor) -> Tensor:
    """[..., T, d] as [N, heads, T, d], with the channels next to each other, as every fused kernel wants them."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim == 3:
        return x[:, None]
    return x if x.ndim == 4 else x.flatten(0, -4)


def _attend_to_line(q: Tensor, k: Any, v: Any, logits: Logits) -> Any:
    keys, values = (x.parts if isinstance(x, Joined) else (x,) for x in (k, v))
    if len(keys) != len(values) or any(
        isinstance(x, Line) != isinstance(y, Line) or x.shape[-2] != y.shape[-2]
        for x, y in zip(keys, values, strict=True)
    ):
        return NotImplemented
    lines = [(x, y) for x, y in zip(keys, values, strict=True) if isinstance(x, Line)]
    if len(lines) != 1 or lines[0][0].c is not lines[0][1].c:
        return NotImplemented
    line_k, line_v = lines[0]
    samples = line_k.c.shape[0]
    batch = q.shape[:-2]
    if samples == 0 or math.prod(batch) % samples:
        return NotImplemented

    def by_head(x: Tensor) -> Tensor:
        """[n, ..., (T,) d] as [samples, heads, (T,) d]."""
        return x.reshape(samples, math.prod(batch) // samples, *x.shape[len(batch) :])

    plain_k, plain_v = _tokens(keys, k), _tokens(values, v)
    # b is the same for every sample: it comes from a bias.
    b_k, b_v = (None if line.b is None else by_head(line.b)[0] for line in (line_k, line_v))
    logits.chain.tell("attentions by rank one")
    out = rank_one.attention(
        by_head(q),
        by_head(plain_k),
        by_head(plain_v),
        line_k.c,
        by_head(line_k.u),
        by_head(line_v.u),
        b_k,
        b_v,
        logits.scale,
    )
    return out.reshape(*batch, q.shape[-2], v.shape[-1])


def _tokens(parts: Sequence[Any], whole: Any) -> Tensor:
    """The plain ones among the parts, [..., S, d]."""
    plain = [part for part in parts if isinstance(part, Tensor)]
    if not plain:
        line: Line = parts[0]
        return line.u.new_empty((*whole.shape[:-2], 0, whole.shape[-1]))
    return plain[0] if len(plain) == 1 else torch.cat(plain, dim=-2)
