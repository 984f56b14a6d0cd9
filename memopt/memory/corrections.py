"""What a fake step needs besides fake tensors: torch's predictions set right, and true tensors left alone.

A copy of a model runs the same functions as the model, and what these have closed over is true: a loss with parameters
of its own, a hook that calls another module, a ``forward`` that was replaced on an instance. :class:`Corrected` runs
their operations on fake twins, so that nothing is written to a true tensor, and lets gradients go to the twin, which
for a tensor that was copied is its copy.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from memopt.errors import MemoptError
from memopt.memory.fake import Copies, is_plain
from memopt.memory.memo import Memo

_aten = torch.ops.aten
_VIEW = _aten.view.default
_BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
_WEIGHT_OF_NORM = {
    _aten.native_layer_norm.default: 2,
    _aten.native_group_norm.default: 1,
    _aten.native_batch_norm.default: 1,
    _aten._native_batch_norm_legit.default: 1,
    _aten._native_batch_norm_legit.no_stats: 1,
    _aten._batch_norm_with_update.default: 1,
}
"""Norms whose results begin with the output, the mean and its like, with the position of their weight."""
_GROUP_NORM_BACKWARD = _aten.native_group_norm_backward.default
_CLONE = _aten.clone.default
_RNN = _aten.mkldnn_rnn_layer.default
_LSTM = 2  # the operator's name for it
_PAGE = 4096
_ROWS = 1 << 20
"""What a recurrent layer may be asked with: rows times hidden features, about 64 MiB."""
_ITEM = _aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_LIFTS = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default, _aten.lift.default)
"""What torch does to a literal, which fake tensors know the values of."""
_READS = (_ITEM, _aten.detach.default)
"""What true tensors answer themselves; what is written to the results of the latter is written to fake twins."""

ORIGINAL = (
    "Operations reach the model itself past its copy, first {name}: through a forward replaced on an instance, or a "
    "loss that uses the model. They count, but in no module, and passes do not act there; real=True runs the model "
    "itself."
)
HOOKS = (
    "Hooks on {count} of the model's parameters (register_hook, register_post_accumulate_grad_hook) do not run on its "
    "copy, so what they allocate or free is not counted; with real=True it is."
)


class Corrected(TorchDispatchMode):
    """Where torch's predictions for fake tensors need help.

    Norms of low-precision inputs with float32 weights keep their statistics in float32, and the gradient of a group
    norm's input has the input's type. Views, and sums and products with numbers, get the strides that they truly have
    in dimensions of size 1: these decide whether a tensor of batch 1 passes for channels-last, and so what copies it.
    Clones of sparse tensors have their entries. A recurrent layer of oneDNN keeps a workspace.

    True tensors are replaced as the module's documentation says.
    With ``scalars``, whoever asks for a value gets 1000: optimizers read their step counts, as late in a run.
    """

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.scalars = False
        self.notes = [HOOKS.format(count=copies.hooked)] if copies.hooked else []
        """What the figures take for granted, in words."""
        self._copies = copies
        self._memo = Memo(copies.mode)
        self._twins = WeakTensorKeyDictionary()
        # By id, held: gradients of true tensors, what takes them from there, and what the run has written to.
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._hooks: list[Any] = []
        self._written: dict[int, Tensor] = {}
        self._reached = False
        """Whether the model itself was reached past its copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM and self.scalars:
            dtype = args[0].dtype
            return dtype == torch.bool or (1000.0 if dtype.is_floating_point else 1000)
        if func is _DEVICE and type(args[0]) is FakeTensor and not self._copies.fakes:  # half of all there is to answer
            return args[0].fake_device
        kwargs = kwargs or {}
        key = self._memo.key(func, args, kwargs)
        if key is None or self._copies.fakes:  # else all tensors are fake, and none is the model's own
            found = [t for t in _tensors((args, kwargs)) if self._is_foreign(t)]
            if found and func not in _LIFTS:
                return self._on_twins(func, args, kwargs, found)
        return self._corrected(func, args, kwargs, key)

    def _corrected(self, func: Any, args: Any, kwargs: Any, key: Any = None) -> Any:
        result = func(*args, **kwargs) if key is None else self._memo.run(key, func, args, kwargs)
        if func in _WEIGHT_OF_NORM:
            out, mean, rstd, *more = result
            weight = args[_WEIGHT_OF_NORM[func]]
            if weight is not None and weight.dtype is torch.float32 and mean.dtype is not torch.float32:
                return out, mean.float(), rstd.float(), *more
        elif func is _GROUP_NORM_BACKWARD and result[0] is not None:
            return result[0].to(args[1].dtype), *result[1:]
        elif func is _VIEW and 1 in result.shape:
            strides = _strides(args[0].shape, args[0].stride(), result.shape)
            if strides is not None and strides != result.stride():
                return result.as_strided(result.shape, strides, result.storage_offset())
        elif func in _BINARY and 1 in result.shape and any(_shape(arg) != result.shape for arg in args):
            with no_dispatch():  # torch.empty is told of no mode: its meta tensors are not fake
                strides = func(*map(_meta, args), **kwargs).stride()
            if strides != result.stride():
                return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device)
        elif func is _CLONE and args[0].layout is torch.sparse_coo:
            parts = args[0]._indices().clone(), args[0]._values().clone()
            coalesced = args[0].is_coalesced()
            return torch.sparse_coo_tensor(*parts, args[0].shape, is_coalesced=coalesced, check_invariants=False)
        elif func is _RNN:
            return *result[:3], torch.empty(_workspace(*args), dtype=torch.uint8, device=result[3].device)
        return result

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer for values that are asked for inside."""
        self.scalars = True
        try:
            yield
        finally:
            self.scalars = False

    # --- true tensors --------------------------------------------------------------------------------------------

    def twin(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor in the operations of this run: itself, or the fake twin of a true one."""
        return self._adopted(tensor) if self._is_foreign(tensor) and _has_twin(tensor) else tensor

    def _is_foreign(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):  # also the model may be fake
            return self._copies.fakes and self._copies.copied(tensor) is not None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        if is_traceable_wrapper_subclass(tensor):
            return any(self._is_foreign(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return True

    def _on_twins(self, func: Any, args: Any, kwargs: Any, found: Sequence[Tensor]) -> Any:
        """Run an operation on twins in place of the tensors ``found`` among its arguments."""
        if func in _READS and not isinstance(found[0], FakeTensor) and id(found[0]) not in self._written:
            with no_dispatch():
                return func(*args, **kwargs)
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        twins: dict[int, Tensor] = {}
        for tensor in found:
            if _has_twin(tensor):
                if tensor.requires_grad and torch.is_grad_enabled():
                    self._follow(tensor, func)
                twins[id(tensor)] = self._adopted(tensor)
                if not self._reached and self._copies.owned(tensor):
                    self._reached = True
                    self.notes.append(ORIGINAL.format(name=_name(func)))
            elif any(tensor is other for other in written):
                raise MemoptError(_refusal(func, f"writes to a {type(tensor).__name__} of layout {tensor.layout}"))
        written = [t for t in written if id(t) in twins]
        self._written.update({id(t): t for t in written if not t.requires_grad})
        result = self._corrected(func, *_replaced((args, kwargs), twins))
        return _replaced(result, {id(twins[id(t)]): t for t in written}) if written else result

    def _adopted(self, tensor: Tensor) -> Tensor:
        made = cast("Tensor | None", self._twins.get(tensor))
        if made is None:
            made = self._copies.copied(tensor)
            if made is None:
                with _disable_current_modes():  # a tracker sees none of this
                    made = self._copies.plain(tensor)
            self._twins[tensor] = made
        return made

    def _follow(self, leaf: Tensor, func: Any) -> None:
        """Let what becomes the gradient of a true tensor become that of its twin."""
        if id(leaf) in self._gradients or id(leaf) in self._written:
            return
        twin = self._adopted(leaf)
        if not leaf.is_leaf:
            raise MemoptError(_refusal(func, "differentiates through a tensor that was computed before"))
        if leaf.device != twin.device:
            raise MemoptError(_refusal(func, f"uses a tensor on {leaf.device} that requires a gradient"))
        if leaf._post_accumulate_grad_hooks:
            raise MemoptError(_refusal(func, "uses a parameter with hooks on its gradient"))

        def before(_: Tensor) -> None:
            leaf.grad = twin.grad

        def after(_: Tensor) -> None:
            twin.grad, leaf.grad = leaf.grad, None
            for hook in (twin._post_accumulate_grad_hooks or {}).values():
                hook(twin)

        self._gradients[id(leaf)] = leaf, leaf.grad
        leaf.grad = None
        self._hooks += [leaf.register_hook(before), leaf.register_post_accumulate_grad_hook(after)]

    def __exit__(self, *exc: Any) -> Any:
        try:
            return super().__exit__(*exc)
        finally:
            for hook in self._hooks:
                hook.remove()
            for leaf, gradient in self._gradients.values():
                leaf.grad = gradient
            with no_dispatch():
                for tensor in self._written.values():
                    if tensor.grad_fn is not None:  # by what was written to it, in a graph of fake tensors
                        tensor.detach_()


def _has_twin(tensor: Tensor) -> bool:
    return is_plain(type(tensor)) and tensor.layout in (torch.strided, torch.sparse_coo)


def _name(func: Any) -> str:
    return str(func._schema.name).replace("::", ".")


def _refusal(func: Any, what: str) -> str:
    return (
        f"{_name(func)} {what}, which no copy has: code of the model, its hooks or the loss has closed over it. "
        "Profile it on true tensors: real=True, or --real."
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    places = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return list(_tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in places]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _replaced(value: Any, others: dict[int, Tensor]) -> Any:
    """The same with some tensors replaced, which are found by their ids."""
    if isinstance(value, Tensor):
        return others.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(item, others) for item in value])
    if isinstance(value, dict):
        return {key: _replaced(item, others) for key, item in value.items()}
    return value


def _workspace(x: Tensor, *args: Any) -> int:
    """Bytes that oneDNN keeps for the backward of a recurrent layer (``mkldnn_rnn_layer``).

    There are several arrays. Their sizes are linear in both the rows (steps times batch) and the batch, and each begins
    on a page. Some number of rows, the period, makes whole pages of all of them, so the size for any numbers follows
    from the sizes for small ones, which true layers of zeros are asked for. Where even these would be large, a shorter
    period does, and some pages may be wrong.
    """
    *weights, _, _, _, sizes, mode, hidden, _, biases, _, _, train = args
    if not train or not x.numel() or sizes or mode != _LSTM:
        return 0
    steps, batch, features = x.shape  # also where batch_first says otherwise
    ask = functools.partial(_true_workspace, x.dtype, features, tuple(tuple(w.shape) for w in weights), hidden, biases)
    whole = _PAGE // math.gcd(64, hidden * x.dtype.itemsize)
    limit = max(1, _ROWS // hidden)
    period = whole
    while True:
        few, small = (steps - 1) % (period // math.gcd(period, batch)) + 1, (batch - 1) % period + 1
        if few * small <= limit or period == 1:
            break
        period //= 2
    long = min(whole, max(64, 1 << (limit.bit_length() - 1)))
    by_rows, by_both = (ask(s, b) - ask(1, long) for s, b in ((2, long), (1, 2 * long)))  # for ``long`` more of them
    rest = by_rows * (steps * batch - few * small) + (by_both - by_rows) * (batch - small)
    size: int = ask(few, small) + rest // long
    return size


@functools.cache
def _true_workspace(
    dtype: torch.dtype, features: int, weights: Any, hidden: int, biases: bool, steps: int, batch: int
) -> int:
    with no_dispatch():
        shapes = ((steps, batch, features), *weights, (batch, weights[1][1]), (batch, hidden))
        zeros = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        kept: Tensor = _RNN(*zeros, False, [], _LSTM, hidden, 1, biases, False, False, True)[3]
        return kept.numel()


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def _meta(value: Any) -> Tensor:
    if not isinstance(value, Tensor):  # a number, whose type has no say in the strides
        return torch.empty((), device="meta")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _strides(old: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a view, as computeStride_impl in ATen/TensorUtils.cpp; None if there is no such view."""
    if not old or not new or 0 in old:
        return None
    made = [0] * len(new)
    at, base, size, filled = len(new) - 1, strides[-1], 1, 1
    for d in reversed(range(len(old))):
        size *= old[d]
        if d and (old[d - 1] == 1 or strides[d - 1] == size * base):
            continue  # the dimension before belongs to the same chunk of memory
        while at >= 0 and (filled < size or new[at] == 1):
            made[at] = filled * base
            filled *= new[at]
            at -= 1
        if filled != size:
            return None
        if d:
            base, size, filled = strides[d - 1], 1, 1
    return tuple(made) if at == -1 else None
