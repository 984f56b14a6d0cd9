"""CUDA's kernels on fake CPU tensors: what they keep and allocate, for a profile on a machine without a GPU.

Above the level of kernels, torch runs the same code for all devices: operators, their derivatives
(tools/autograd/derivatives.yaml), autograd. In a few places that code asks for the device and runs *other operators*
on CUDA. :func:`kernels` makes torch run those on fake CPU tensors too. Their shapes come from torch's own meta
functions (torch/_meta_registrations.py, torch/_decomp) and what they keep from their own derivatives, so neither is
modelled here. The places are:

- Dropout is one operator that keeps a mask of bytes (``dropout`` in ATen/native/Dropout.cpp).
- Attention has its own kernels, see ``cuda_attention``.
- Autocast has its own lists of operators, see ``cuda_autocast``.
- ``softmax`` of float16 with a float32 result makes no copy of its input (ATen/native/SoftMax.cpp).
- ``rms_norm`` is one operator that keeps its input and the inverse norms (ATen/native/layer_norm.cpp).
- ``group_norm`` makes its input contiguous, also one in channels-last format (ATen/native/group_norm.cpp).
- ``max_pool1d`` always makes indices (ATen/native/Pooling.cpp, MaxPooling.cpp).
- The statistics of layer and batch norms are float32 for every input of lower precision.
- ``logsigmoid`` keeps no buffer (ATen/native/cuda/ActivationLogSigmoidKernel.cu), and ``embedding_bag`` keeps other
  indices (EmbeddingBag.cu).
- Optimizers and gradient clipping take all parameters at once (``foreach``, torch/optim/optimizer.py); their step
  counts are on the CPU, unless ``capturable`` or ``fused``.

The first seven are kernels in Python, registered at the dispatcher for CPU tensors and taken away again: callers in C++
reach them too, which a function mode would miss, and they come before autograd, where a dispatch mode would be too
late. Except for autocast's, they leave real tensors alone. What differs only in an operator's results is corrected by a
dispatch mode.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.optim.optimizer as optim
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import _scoped_library
from torch.nn.modules import module as nn_module
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.memory import cuda_attention, cuda_autocast

_ATEN = torch.ops.aten
_LOW = (torch.float16, torch.bfloat16)
_NORMS = {
    _ATEN.native_layer_norm.default,
    _ATEN.native_batch_norm.default,
    _ATEN._native_batch_norm_legit.default,
    _ATEN._native_batch_norm_legit.no_stats,
}
_BAGS = {_ATEN._embedding_bag.default, _ATEN._embedding_bag_forward_only.default}
ALWAYS = (
    "The GPU is an Ampere or newer with torch's defaults. Code of the model that asks for the device sees a CPU.",
    "Memory that a kernel takes and frees inside itself, such as workspaces of cuDNN and cuBLAS, is not counted.",
    "The CUDA context, what libraries hold all along, and fragmentation in the allocator are not counted.",
)
ATTENTION = (
    "Attention runs as FlashAttention where it can, else memory-efficient, else as plain operations. cuDNN's, which "
    "some versions prefer on H100, keeps the same."
)
FOREACH = "The optimizer updates all parameters at once (foreach), as is the default on CUDA."
RNN = "RNNs count as they run on a CPU; cuDNN keeps its own reserve for backward instead."
FAST_PATH = "nn.MultiheadAttention and nn.TransformerEncoder run without their fast path for inference."


class Notes(list[str]):
    """Assumptions in words, each said once."""

    def add(self, text: str) -> None:
        if text not in self:
            self.append(text)


_LOCK = threading.RLock()  # what is registered at the dispatcher holds for all threads
_ACTIVE: list[Notes] = []


@contextlib.contextmanager
def kernels() -> Iterator[Notes]:
    """Operations on fake CPU tensors keep and allocate what they do on CUDA; enter it inside the fake mode.

    Yields what is assumed about the device, in words; it grows while the model runs.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        if _ACTIVE:  # nested: all is in place
            yield _ACTIVE[0]
            return
        notes = Notes(ALWAYS)
        _ACTIVE.append(notes)
        stack.callback(_ACTIVE.clear)
        stack.enter_context(_operators(notes))
        stack.enter_context(cuda_autocast.cuda_lists())
        stack.enter_context(_optimizers(notes))
        stack.enter_context(_modules(notes))
        stack.enter_context(_Results())
        yield notes


@contextlib.contextmanager
def _operators(notes: Notes) -> Iterator[None]:
    """Register what calls other operators on CUDA than on a CPU."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        notes.add(ATTENTION)
        return cuda_attention.attention(*args, **kwargs)

    with _scoped_library("aten", "IMPL") as library:
        for op, kernel in (
            (_ATEN.dropout.default, _dropout),
            (_ATEN.softmax.int, _to_float32(_ATEN._softmax)),
            (_ATEN.log_softmax.int, _to_float32(_ATEN._log_softmax)),
            (_ATEN.group_norm.default, _group_norm),
            (_ATEN.max_pool1d.default, lambda x, *args: _ATEN.max_pool1d_with_indices(x, *args)[0]),
            (_ATEN.scaled_dot_product_attention.default, attention),
        ):
            library.impl(op, _for_fakes(op, kernel), "AutogradCPU")
        if len(_ATEN._fused_rms_norm.default._schema.returns) == 2:  # before torch 2.9 CUDA had none
            library.impl(_ATEN.rms_norm.default, _for_fakes(_ATEN.rms_norm.default, _rms_norm), "AutogradCPU")
            # Only operators with a kernel of their own have their derivative used. It never runs on a fake tensor.
            fused = _ATEN._fused_rms_norm.default
            library.impl(fused, lambda *args: _as_on_cpu(fused, *args), "CPU")
        yield


def _as_on_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operator without kernels of its own does, in C++; its own ``decompose`` may prefer Python."""
    return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _for_fakes(op: Any, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel for fake tensors that leaves others, and those it answers NotImplemented for, to torch."""

    def choose(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Any = kernel(x, *args, **kwargs) if isinstance(x, FakeTensor) else NotImplemented
        if result is NotImplemented:
            result = _as_on_cpu(op, x, *args, **kwargs)
        return result  # type: ignore[no-any-return]

    return choose


def _dropout(x: Tensor, p: float, train: bool) -> Any:
    # is_fused_kernel_acceptable in Dropout.cpp
    return _ATEN.native_dropout(x, p, train)[0] if train and 0 < p < 1 and x.numel() else NotImplemented


def _to_float32(kernel: Any) -> Callable[..., Any]:
    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        half_to_float = x.dtype is torch.float16 and dtype is torch.float32
        return kernel(x, dim, True) if half_to_float else NotImplemented

    return softmax


def _group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _as_on_cpu(_ATEN.group_norm.default, x.contiguous(), *args, **kwargs)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Any:
    # The cases that rms_norm_symint in layer_norm.cpp leaves to plain operations.
    if x.is_complex() or (weight is not None and weight.dtype != x.dtype) or _channels_last(x):
        return NotImplemented
    return _ATEN._fused_rms_norm(x, shape, weight, eps)[0]


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()])


class _Results(TorchDispatchMode):
    """Results that are of another type, or elsewhere, on CUDA than torch predicts for a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _NORMS:
            out, mean, rstd = result
            if mean.dtype in _LOW:  # at::toAccumulateType
                return out, mean.float(), rstd.float()
        elif func is _ATEN._scaled_dot_product_efficient_attention.default:
            # Its random seed and offset are on the CPU (Note [Seed and Offset Device] in attention.cu).
            out, sums, seed, offset = result
            return out, sums, seed.new_empty(0), offset.new_empty(0)
        elif func is _ATEN.log_sigmoid_forward.default:
            return result[0], result[1].new_empty(0)
        elif func in _BAGS:
            # Positions and indices of maxima have other sizes, and the type of the indices (_embedding_bag_cuda).
            indices, offsets, mode = args[1], args[2], args[4] if len(args) > 4 else 0
            most = result[0].shape if mode == 2 else (0,)
            return result[0], *(indices.new_empty(size) for size in (indices.shape, offsets.shape, most))
        return result


@contextlib.contextmanager
def _optimizers(notes: Notes) -> Iterator[None]:
    """Optimizers choose as they do for parameters on CUDA, each by its own rules."""
    supported = "_get_foreach_kernels_supported_devices"
    capturable = "_get_capturable_supported_devices"
    devices = [*getattr(optim, supported)(), "cpu"]

    def steps_off_device(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not type(optimizer).__module__.startswith("torch.optim") or isinstance(optimizer, torch.optim.ASGD):
            return  # ASGD keeps them on the device
        for group in optimizer.param_groups:
            if group.get("capturable") or group.get("fused"):
                continue
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                for name in ("step", "mu_product"):
                    if isinstance(state.get(name), FakeTensor):
                        state[name].untyped_storage().resize_(0)  # counts nothing; no fake operation looks at it

    def say(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(group.get("foreach", True) is None and not group.get("fused") for group in optimizer.param_groups):
            notes.add(FOREACH)

    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_autocast.swapped(optim, supported, lambda: devices))
        for module in (optim, _foreach_utils):  # the latter is what torch.nn.utils.clip_grad_norm_ asks
            foreach = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(cuda_autocast.swapped(module, "_foreach_supported_types", foreach))
        for name, module in list(sys.modules.items()):  # each has its own name for what says where capturable may run
            if name.startswith("torch.optim.") and hasattr(module, capturable):
                stack.enter_context(cuda_autocast.swapped(module, capturable, lambda *_, **__: ["cpu"]))
        stack.callback(optim.register_optimizer_step_pre_hook(say).remove)
        stack.callback(optim.register_optimizer_step_post_hook(steps_off_device).remove)
        yield


@contextlib.contextmanager
def _modules(notes: Notes) -> Iterator[None]:
    """What is not the same, or not known, for whole modules."""

    def say(module: nn.Module, args: Any) -> None:
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            notes.add(RNN)
        elif isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) and not module.training:
            notes.add(FAST_PATH)

    enabled = torch.backends.mha.get_fastpath_enabled()
    hook = nn_module.register_module_forward_pre_hook(say)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that would hide what its parts allocate
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        hook.remove()
