"""Which operations are cheap to make again, and how: the table behind the pass lean_ops.

An operation is here if it reads and writes its tensors once or twice and nothing more: norms, activations, dropout,
elementwise arithmetic, casts, copies. What convolutions, products of matrices and attention give is kept.

Made again, an operation must give the same bits and change nothing: norms that update running statistics run without
them, operations in place run out of place, and dropout runs with the generator as it was. Dropout's own derivative
needs the mask, too, and makes it from that state of the generator (:class:`SeededDropout`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memopt.deferred.following import WRITERS
from memopt.deferred.value import in_autocast


class Replay(NamedTuple):
    """A call that gives what another gave."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Again = Callable[[Any, tuple[Any, ...], dict[str, Any]], "tuple[Callable[..., Any], Replay] | None"]
"""For a call: what to run in its place now, and what to run when it is made again; None: it cannot be."""

NORMS = "group_norm layer_norm rms_norm batch_norm instance_norm local_response_norm"
ACTIVATIONS = """
relu relu6 leaky_relu prelu elu selu celu gelu silu mish softplus sigmoid tanh hardsigmoid hardswish hardtanh logsigmoid
glu threshold softsign softmax log_softmax
"""
DROPOUT = "dropout"
ARITHMETIC = """
add sub mul div true_divide neg rsub square clamp where abs exp sin cos __radd__ __rsub__ __rmul__ __rdiv__ __rtruediv__
"""
COPIES = """
to type type_as float double half bfloat16 contiguous clone cat concat stack pad interpolate upsample pixel_shuffle
pixel_unshuffle repeat repeat_interleave roll flip
"""
FAMILIES = {
    "norms": NORMS,
    "activations": ACTIVATIONS,
    "dropout": DROPOUT,
    "arithmetic": ARITHMETIC,
    "casts and copies": COPIES,
}
"""Names of torch's functions and methods."""


def named(*names: str) -> list[Any]:
    """torch's functions and methods of these names."""
    homes = [(home, name) for name in names for home in (torch, Tensor, F)]
    return [getattr(home, name) for home, name in homes if hasattr(home, name)]


@functools.lru_cache(maxsize=4096)
def _parameters(func: Any) -> tuple[str, ...]:
    """The names of a function's parameters; none where torch's C++ code has them."""
    try:
        return tuple(inspect.signature(func).parameters)
    except (ValueError, TypeError):
        return ()


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_parameters(func), args, strict=False)) | kwargs


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of one of torch's functions, which also goes by the name of input."""
    return args[0] if args else kwargs.get("input")


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to its first argument or to ``out``."""
    if func in WRITERS or kwargs.get("out") is not None:
        return True
    return "inplace" in _parameters(func) and bool(_named_arguments(func, args, kwargs).get("inplace"))


def plainly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Replay] | None:
    """The same call once more; out of place."""
    if "inplace" in _parameters(func):
        return func, Replay(func, (), _named_arguments(func, args, kwargs) | {"inplace": False})
    return func, Replay(_OUT_OF_PLACE.get(func, func), args, kwargs)


def done(result: Tensor) -> Again:
    """The same call once more, of one whose result is there."""
    return lambda func, args, kwargs: (lambda *_, **__: result, Replay(func, args, kwargs))


def _with_batch_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of this batch, not of those seen so far: without updating these."""
    given = _named_arguments(func, args, kwargs)
    if given.get("training", False) or given.get("use_input_stats", func is F.instance_norm):
        given |= {"running_mean": None, "running_var": None}
    return func, Replay(func, (), given)


def _seeded_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {"p": 0.5, "training": True, "inplace": False} | _named_arguments(func, args, kwargs)
    x, p = given["input"], given["p"]
    if not given["training"] or given["inplace"] or not 0 < p < 1 or not _layout_is_plain(x):
        return None
    if _generator(x.device) is None:
        return None
    mask = Mask(x, p)

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        dropped: Tensor = SeededDropout.apply(x, mask)
        return dropped

    return compute, Replay(mask.again, (x,), {})


def _layout_is_plain(x: Tensor) -> bool:
    """Whether a tensor's mask lies in memory as it does itself."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])]
    return any(x.is_contiguous(memory_format=each) for each in formats)


def _generator(device: torch.device) -> torch.Generator | None:
    """The device's own, where it is known how dropout uses it."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return None


@contextlib.contextmanager
def _rewound(device: torch.device, state: Tensor) -> Any:
    generator = _generator(device)
    assert generator is not None
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)


class Mask:
    """What dropout is about to multiply a tensor with, to be made again from the state of the generator.

    On CUDA it is a mask of bytes for the fused kernels, elsewhere what the mask and 1 / (1 - p) multiply to.
    """

    def __init__(self, x: Tensor, p: float) -> None:
        generator = _generator(x.device)
        assert generator is not None
        self.p, self.device, self.state = p, x.device, generator.get_state()
        self.fused = x.device.type == "cuda"
        self._like = torch.empty_like(x, device="meta")
        self._needed_twice = x.requires_grad and not self.fused
        self._near: Tensor | None = None

    def make(self) -> Tensor:
        """The factors."""
        if self._near is not None:
            return self._near
        with _rewound(self.device, self.state):
            made = torch.empty_like(self._like, device=self.device)
            if self.fused:
                return torch.native_dropout(made, self.p, True)[1]
            return made.bernoulli_(1 - self.p).div_(1 - self.p)  # as ATen/native/Dropout.cpp does

    def again(self, x: Tensor) -> Tensor:
        """The result of dropout, once more; backward, which comes next, will want the factors, too."""
        if self.fused:
            with _rewound(self.device, self.state):
                return F.dropout(x, self.p, True)
        factors = self.make()
        if self._needed_twice:
            self._near = factors
        return x * factors

    def times(self, grad: Tensor) -> Tensor:
        """The gradient of dropout, in differentiable operations."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            factors = self.make()
        self._near = None
        if self.fused:
            product: Tensor = torch.ops.aten.native_dropout_backward(grad, factors, 1 / (1 - self.p))
            return product
        return grad * factors


class SeededDropout(torch.autograd.Function):
    """Dropout (Srivastava et al., JMLR 15, 2014) that keeps the state of the generator instead of a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return F.dropout(x, mask.p, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.mask.times(grad), None


class OwnGradient(torch.autograd.Function):
    """A part of a concatenation. The gradient it gets is a view, which keeps that of all parts while it waits for that
    of another use; a copy keeps its own bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone() if grad.untyped_storage().nbytes() > grad.nbytes else grad


CASTS = frozenset(named("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"))
"""What gives its input itself where there is nothing to do, as mostly there is."""
JOINS = frozenset(named("cat", "concat"))

_OUT_OF_PLACE = {
    function: getattr(home, name.rstrip("_"))
    for home in (torch, Tensor, F)
    for name in [f"{name}_" for name in f"{ACTIVATIONS} add sub mul div neg clamp".split()]
    if (function := getattr(home, name, None)) is not None and hasattr(home, name.rstrip("_"))
}
OPERATIONS: dict[Any, Again] = {
    **dict.fromkeys(named(*(f"{NORMS} {ACTIVATIONS} {ARITHMETIC} {COPIES}".split())), plainly),
    **dict.fromkeys(_OUT_OF_PLACE, plainly),
    **dict.fromkeys((F.batch_norm, F.instance_norm), _with_batch_statistics),
    **dict.fromkeys((F.dropout,), _seeded_dropout),
}
"""How each cheap function is made again."""

WIDENED = frozenset(named(*f"{NORMS} {ACTIVATIONS}".split()))
"""What autocast may compute in float32."""
PRODUCTS = frozenset(
    named("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
)
"""What autocast gives an input in lower precision."""


def lower_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which autocast gives a product an input of another."""
    if not in_autocast(x.device) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    dtype = torch.get_autocast_dtype(x.device.type)
    return None if dtype == x.dtype else dtype


def autocast_state(device: torch.device) -> tuple[str, bool, torch.dtype | None]:
    """Whether autocast is on for a device, and to which type."""
    on = in_autocast(device)
    return device.type, on, torch.get_autocast_dtype(device.type) if on else None


def autocast_as(state: tuple[str, bool, torch.dtype | None]) -> contextlib.AbstractContextManager[Any]:
    """A context in which it is."""
    device, on, dtype = state
    if not on and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=False)
