"""Rank-one products that are not made, and what becomes of them: lines, and tokens some of which are lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memopt.deferred.following import Following
from memopt.deferred.standin import apply, work
from memopt.deferred.value import (
    CASTS,
    MATMUL,
    Chain,
    Deferred,
    Tell,
    autocast_dtype,
    cast_of,
    is_number,
    order_of,
    parse,
    parse_from,
    rule,
)
from memopt.tensors import PLAIN


class Product(Deferred):
    """a (x) b: entry [n, i, j] is a[n, i] b[n, j]."""

    noun = "a whole product"

    def __init__(self, a: Tensor, b: Tensor, call: tuple[Any, ...], chain: Chain) -> None:
        super().__init__((*a.shape, b.shape[1]), a, call, chain)
        self.a, self.b = a, b


class Products(Following):
    """While active, rank-one products of two matrices' rows are deferred.

    Args:
        tell: hears of each.
        check: looks at the factors first.
        rows: if not None, the product of rows with an entry larger than this is made, and only that.
        defer: False: look, and change nothing.
    """

    def __init__(
        self,
        tell: Tell,
        check: Callable[[Tensor], None] | None = None,
        rows: float | None = None,
        defer: bool = True,
    ) -> None:
        super().__init__(tell)
        self.check, self.rows, self.defer = check, rows, defer

    def begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factors = None
        if func in _PRODUCTS and not kwargs and self.begins:
            factors = _factors(func, args)
        if factors is None:
            return func(*args, **kwargs)
        a, b = factors
        if func not in _MULTIPLY and autocast_dtype(a) != a.dtype:
            a, b = (a.to(autocast_dtype(a)),) * 2 if a is b else (x.to(autocast_dtype(x)) for x in (a, b))
        return self.outer((func, args, kwargs), a, b)

    def outer(self, call: tuple[Any, ...], a: Tensor, b: Tensor) -> Any:
        if self.check is not None:
            self.check(a)
            if b is not a:
                self.check(b)
        func, args, kwargs = call
        if not self.defer:
            return func(*args, **kwargs)
        if not (torch.is_grad_enabled() and a.requires_grad and b.requires_grad):
            # Autograd refuses to go on where a factor that it keeps was changed in place; here nothing would tell.
            a, b = (a.clone(),) * 2 if a is b else (a.clone(), b.clone())
            call = (_multiplied, (a, b), {})
        if self.rows is not None:
            self.chain.tell("products made of rows that are not zero")
            return ActiveRows(a, b, self.rows, call, self.chain)
        self.chain.tell("products not made")
        return Product(a, b, call, self.chain)


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None]


class ActiveRows(Deferred):
    """a (x) b of the rows where neither is zero, [n_active, D, E], and which these are; the other rows are zero."""

    noun = "a whole product"

    def __init__(self, a: Tensor, b: Tensor, threshold: float, call: tuple[Any, ...], chain: Chain) -> None:
        super().__init__((*a.shape, b.shape[1]), a, call, chain)
        with torch.no_grad():
            zero = (a.abs() <= threshold).all(1)  # nothing that is not a number
            if b is not a:
                # Zero times what is not finite is not zero.
                zero = (zero | (b.abs() <= threshold).all(1)) & a.isfinite().all(1) & b.isfinite().all(1)
            self.rows = zero.logical_not().nonzero()[:, 0]
        working = work()
        working.append(self)  # this product is to be made, whatever mode is active besides
        try:
            self.product = _multiplied(a[self.rows], b[self.rows])
        finally:
            working.pop()

    def _as_called(self, why: str) -> Tensor:
        return self.whole(self.product, None, 1)

    def whole(self, active: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """All rows of what a linear map made of the active ones; of zero it makes its bias, along ``axis``."""
        shape = (self.shape[0], *active.shape[1:])
        if bias is None:
            base = active.new_zeros(shape)
        else:
            base = bias.to(active.dtype).view([-1 if dim == axis else 1 for dim in range(len(shape))]).expand(shape)
        return base.index_copy(0, self.rows, active)


@rule(ActiveRows, "conv1d", "linear", "matmul", "__matmul__")
def _(func: Any, x: Any, weight: Tensor, bias: Tensor | None = None, *more: Any) -> Any:
    if not isinstance(x, ActiveRows) or (weight.ndim > 2 and func.__name__ != "conv1d"):
        return NotImplemented
    if bias is not None and bias.ndim != 1:
        return NotImplemented
    given = (weight,) if "matmul" in func.__name__ else (weight, bias, *more)
    x.chain.tell("linear maps of active rows")
    return x.whole(func(x.product, *given), bias, 1 if func.__name__ == "conv1d" else 2)


_MULTIPLY = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_PRODUCTS = (torch.einsum, *_MULTIPLY, *MATMUL)


def _factors(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """a and b of a call that makes a (x) b, or None."""
    if func is torch.einsum:
        parsed = parse(args)
        if parsed is None or not all(type(x) in PLAIN and x.ndim == 2 for x in args[1:]):
            return None
        left, right, out = parsed
        if left[0] != right[0] or len({*left, *right}) != 3:
            return None
        if out == left + right[1]:
            x, y = args[1:]
        elif out == right + left[1]:
            y, x = args[1:]
        else:
            return None
        return (x, y) if x.shape[0] == y.shape[0] and _alike(x, y) else None
    if len(args) != 2 or not all(type(x) in PLAIN and x.ndim == 3 for x in args):
        return None
    x, y = args
    if not _alike(x, y):
        return None
    if x.shape[2] == 1 == y.shape[1] and x.shape[0] == y.shape[0] and x.shape[1] > 1 and y.shape[2] > 1:
        return x[:, :, 0], y[:, 0]
    if func in _MULTIPLY and x.shape[1] == 1 == y.shape[2] and x.shape[0] == y.shape[0]:
        return (y[:, :, 0], x[:, 0]) if x.shape[2] > 1 and y.shape[1] > 1 else None
    return None


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.dtype.is_floating_point and x.device == y.device


@rule(Product, "conv1d")
def _(
    func: Any,
    x: Any,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(x, Product) or weight.shape[2] != 1 or weight.shape[1] != x.shape[1]:
        return NotImplemented
    if stride not in (1, (1,), [1]) or padding not in (0, (0,), [0]):
        return NotImplemented
    u = F.linear(x.a, weight[:, :, 0])
    x.chain.tell("linear maps by rank one")
    return Line(u, bias, x.b, 2, (func, (x, weight, bias, stride, padding, dilation, groups), {}), x.chain)


@rule(Product, "linear")
def _(func: Any, x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(x, Product) or (bias is not None and bias.ndim != 1):
        return NotImplemented
    x.chain.tell("linear maps by rank one")
    return Line(F.linear(x.b, weight), bias, x.a, 1, (func, (x, weight, bias), {}), x.chain)


@rule(Product, "matmul", "bmm", "__matmul__")
def _(func: Any, x: Any, y: Any) -> Any:
    if isinstance(x, Product) and isinstance(y, Tensor) and y.ndim in (2, 3):
        u, c, axis = (x.b[:, None] @ y)[:, 0], x.a, 1
    elif isinstance(y, Product) and isinstance(x, Tensor) and x.ndim in (2, 3):
        u, c, axis = (x @ y.a[:, :, None])[:, :, 0], y.b, 2
    else:
        return NotImplemented
    source = x if isinstance(x, Product) else y
    source.chain.tell("linear maps by rank one")
    return Line(u, None, c, axis, (func, (x, y), {}), source.chain)


@rule(Product, "einsum")
def _(func: Any, *args: Any) -> Any:
    parsed = parse_from(Product, args)
    if parsed is None:
        return NotImplemented
    mine, other, out, product, factor = parsed
    n, i, j = list(mine)
    summed = [letter for letter in (i, j) if letter in other and letter not in out]
    kept = [letter for letter in (i, j) if letter not in other and letter in out]
    if not isinstance(factor, Tensor) or len(summed) != 1 or len(kept) != 1 or out[0] != n:
        return NotImplemented
    a, c = (product.a, product.b) if summed[0] == i else (product.b, product.a)
    rest = out.replace(kept[0], "")
    if set(rest) - {n, *other}:
        return NotImplemented
    u = torch.einsum(f"{n}{summed[0]},{other}->{rest}", a, factor)
    product.chain.tell("linear maps by rank one")
    return Line(u, None, c, out.index(kept[0]), (func, args, {}), product.chain)


@rule(Product, "transpose", "swapaxes", "permute")
def _(func: Any, x: Any, *dims: Any) -> Any:
    order = order_of(func, 3, dims)
    if order == [0, 2, 1]:
        return Product(x.b, x.a, (func, (x, *dims), {}), x.chain)
    return x if order == [0, 1, 2] else NotImplemented


@rule(Product, *CASTS)
def _(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = cast_of(func, x, args, kwargs) if isinstance(x, Product) else None
    if dtype is None:
        return NotImplemented
    return Product(x.a.to(dtype), x.b.to(dtype), (func, (x, *args), kwargs), x.chain)


@rule(Product, "mul", "div")
def _(func: Any, x: Any, y: Any) -> Any:
    if isinstance(y, Product) and is_number(x):  # which torch.mul takes on either side
        x, y = y, x
    if not isinstance(x, Product) or not is_number(y):
        return NotImplemented
    return Product(func(x.a, y), x.b, (func, (x, y), {}), x.chain)


class Line(Deferred):
    """u (x) c + b with the D entries of c along one dimension, the columns.

    Args:
        u: the features [n, ...], without the columns.
        b: added to the features, the same for all n: [...], or None.
        c: [m, D] with n a multiple of m: row i goes with row i // (n / m) of c, as heads go with their sample.
        axis: the dimension of the columns, at least 1.
    """

    noun = "a product's linear map"

    def __init__(self, u: Tensor, b: Tensor | None, c: Tensor, axis: int, call: tuple[Any, ...], chain: Chain) -> None:
        super().__init__((*u.shape[:axis], c.shape[1], *u.shape[axis:]), u, call, chain)
        self.u, self.b, self.c, self.axis = u, None if b is None else b.expand(u.shape), c, axis

    def features(self, change: Callable[[Tensor], Tensor], axis: int, call: tuple[Any, ...]) -> Line:
        """The line whose features are changed alike in u and b."""
        changed = Line(change(self.u), None, self.c, axis, call, self.chain)
        changed.b = None if self.b is None else change(self.b)
        return changed


class Joined(Deferred):
    """Lines and tensors one after another along the dimension of the columns."""

    noun = "tokens with those of a product"

    def __init__(self, parts: Sequence[Line | Tensor], axis: int, call: tuple[Any, ...], chain: Chain) -> None:
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(shape, next(p for p in parts if isinstance(p, Tensor)), call, chain)
        self.parts, self.axis = tuple(parts), axis

    def each(self, change: Callable[[Any], Any], axis: int, call: tuple[Any, ...]) -> Any:
        """The tokens with every part changed alike; NotImplemented if a part cannot be."""
        parts = [change(part) for part in self.parts]
        if any(part is NotImplemented for part in parts):
            return NotImplemented
        return Joined(parts, axis, call, self.chain)


def _reshaped(x: Line | Joined, new: list[int], call: tuple[Any, ...]) -> Any:
    old, axis = list(x.shape), x.axis
    if -1 in new:
        new[new.index(-1)] = math.prod(old) // -math.prod(new)
    before, after = math.prod(old[:axis]), math.prod(old[axis + 1 :])
    for at in range(1, len(new)):
        if new[at] == old[axis] and math.prod(new[:at]) == before and math.prod(new[at + 1 :]) == after:
            break
    else:
        return NotImplemented
    if isinstance(x, Joined):
        return x.each(lambda part: _reshape_part(part, [*new[:at], part.shape[axis], *new[at + 1 :]]), at, call)
    if new[0] % max(x.c.shape[0], 1):
        return NotImplemented
    features = [*new[:at], *new[at + 1 :]]
    return x.features(lambda u: u.reshape(features), at, call)


def _reshape_part(part: Line | Tensor, shape: list[int]) -> Any:
    if isinstance(part, Tensor):
        return part.reshape(shape)
    return _reshaped(part, shape, (Tensor.reshape, (part, shape), {}))


@rule(Line, "reshape", "view")
@rule(Joined, "reshape", "view")
def _(func: Any, x: Any, *shape: Any) -> Any:
    if not isinstance(x, (Line, Joined)) or not shape or isinstance(shape[0], torch.dtype):
        return NotImplemented
    new = list(shape[0]) if isinstance(shape[0], (tuple, list)) else list(shape)
    return _reshaped(x, new, (func, (x, *shape), {}))


@rule(Line, "transpose", "swapaxes", "permute")
@rule(Joined, "transpose", "swapaxes", "permute")
def _(func: Any, x: Any, *dims: Any) -> Any:
    return permuted(x, order_of(func, x.ndim, dims), (func, (x, *dims), {}))


def permuted(x: Any, order: list[int], call: tuple[Any, ...] | None = None) -> Any:
    """A tensor, line or joined tokens with its dimensions in another order; NotImplemented if rows would move."""
    if isinstance(x, Tensor):
        return x.permute(order)
    if order[0] != 0 or not isinstance(x, (Line, Joined)):
        return NotImplemented
    axis, call = order.index(x.axis), call or (torch.permute, (x, order), {})
    if isinstance(x, Joined):
        return x.each(lambda part: permuted(part, order), axis, call)
    rest = [dim - (dim > x.axis) for dim in order if dim != x.axis]
    return x.features(lambda u: u.permute(rest), axis, call)


@rule(Line, "chunk", "split", "unbind")
@rule(Joined, "chunk", "split", "unbind")
def _(func: Any, x: Any, *args: Any, dim: int | None = None) -> Any:
    size, dim = _sizes(func, args, dim)
    dim %= x.ndim
    if dim in (0, x.axis):
        return NotImplemented
    return tuple(_cut(x, func, size, dim, i) for i in range(_count(func, x.shape[dim], size)))


def _sizes(func: Any, args: tuple[Any, ...], dim: int | None) -> tuple[tuple[Any, ...], int]:
    given = 0 if func.__name__ == "unbind" else 1
    if dim is None:
        dim = args[given] if len(args) > given else 0
    return args[:given], dim


def _count(func: Any, length: int, size: tuple[Any, ...]) -> int:
    with torch.no_grad():
        return len(func(torch.empty(length, device="meta"), *size))


def _cut(x: Any, func: Any, size: tuple[Any, ...], dim: int, i: int) -> Any:
    """The i-th part of x cut along dim, which is not that of the columns."""
    call: tuple[Any, ...] = (lambda whole: func(whole, *size, dim=dim)[i], (x,), {})
    axis = x.axis - (func.__name__ == "unbind" and dim < x.axis)
    if isinstance(x, Joined):
        return x.each(
            lambda part: func(part, *size, dim=dim)[i] if isinstance(part, Tensor) else _cut(part, func, size, dim, i),
            axis,
            call,
        )
    return x.features(lambda u: func(u, *size, dim=dim - (dim > x.axis))[i], axis, call)


@rule(Line, "mul", "div", "contiguous")
@rule(Joined, "mul", "div", "contiguous")
def _(func: Any, x: Any, *args: Any) -> Any:
    if not isinstance(x, (Line, Joined)) or not all(map(is_number, args)):
        return NotImplemented
    return _alike_in_all(func, x, args)


@rule(Line, *CASTS)
@rule(Joined, *CASTS)
def _(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = cast_of(func, x, args, kwargs) if isinstance(x, (Line, Joined)) else None
    return NotImplemented if dtype is None else _alike_in_all(Tensor.to, x, (dtype,))


def _alike_in_all(func: Any, x: Line | Joined, args: tuple[Any, ...]) -> Any:
    """What func makes of each of x's elements."""
    call: tuple[Any, ...] = (func, (x, *args), {})
    if isinstance(x, Joined):
        return x.each(lambda part: apply(func, (part, *args), {}), x.axis, call)
    return x.features(lambda u: func(u, *args), x.axis, call)


@rule(Line, "cat", "concat", "concatenate")
@rule(Joined, "cat", "concat", "concatenate")
def _(func: Any, parts: Any, dim: int = 0) -> Any:
    source = next(part for part in parts if isinstance(part, (Line, Joined)))
    flat: list[Line | Tensor] = []
    for part in parts:
        if isinstance(part, Joined) and part.axis == source.axis:
            flat.extend(part.parts)
        elif isinstance(part, Tensor) or (isinstance(part, Line) and part.axis == source.axis):
            flat.append(part)
        else:
            return NotImplemented
    if dim % source.ndim != source.axis or not any(isinstance(part, Tensor) for part in flat):
        return NotImplemented
    return Joined(flat, source.axis, (func, (parts, dim), {}), source.chain)
