"""CUDA's autocast on CPU tensors: which operators run in which precision.

Autocast has a list of operators for each device type. CUDA's is longer than the CPU's: norms and softmax run in
float32 there. The lists and policies are in ATen/autocast_mode.h, what one device has alone in autocast_mode.cpp. Here
CUDA's are registered at the dispatcher for the CPU; where the CPU has an operator that CUDA has not, it is passed by.
Operators that both run in low precision stay as they are, with their cache of converted weights.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import _scoped_library, fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map_only


def _names(text: str) -> list[str]:
    return text.split()


# The macros AT_FORALL_..., by policy.
FLOAT32 = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
    pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm
    nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
    kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
    upsample_bicubic2d _upsample_bicubic2d_aa
""")
FLOAT32_RESULT = _names("""
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
""")
OTHER_OVERLOAD = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")
LOW = _names("_convolution convolution addmv addr einsum mv")
"""Those that the CPU does not have; without the cache of weights."""
BANNED = ["binary_cross_entropy"]
LEFT = _names("""
    _convolution.deprecated addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input linalg_vecdot linear matmul mm prelu scaled_dot_product_attention
    chain_matmul linalg_multi_dot gru_cell lstm_cell rnn_relu_cell rnn_tanh_cell
    _scaled_dot_product_flash_attention _thnn_fused_gru_cell _thnn_fused_lstm_cell
    cudnn_convolution cudnn_convolution_transpose
""")
"""In low precision on CUDA; here they are too, or consist of operators that are, or are called by such only."""
KEPT = {"conv1d.padding", "conv2d.padding", "conv3d.padding", "_addmm_activation", "mkldnn_rnn_layer"}
"""The CPU's alone, but CUDA gets to the same in their parts."""

_KEY = "AutocastCPU"
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@contextlib.contextmanager
def cuda_lists() -> Iterator[None]:
    """While active, ``torch.autocast`` treats CPU tensors as it treats CUDA's, also when it is asked for CUDA."""
    ours, theirs = registered("AutocastCPU"), registered("AutocastCUDA")
    policies = {
        **dict.fromkeys(FLOAT32, _float32),
        **dict.fromkeys(FLOAT32_RESULT, _float32_result),
        **dict.fromkeys(OTHER_OVERLOAD, _other_overload),
        **dict.fromkeys(WIDEST, _widest),
        **dict.fromkeys(LOW, _low),
        **dict.fromkeys(BANNED, _banned),
    }
    with contextlib.ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are overridden
            for name in sorted(theirs & policies.keys()):
                library.impl(_op(name), policies[name](name), _KEY)
            for name in sorted(ours - theirs - KEPT):
                library.impl(_op(name), fallthrough_kernel, _KEY)
        stack.callback(torch.set_autocast_dtype, "cpu", torch.get_autocast_dtype("cpu"))
        torch.set_autocast_dtype("cpu", torch.get_autocast_dtype("cuda"))
        stack.enter_context(swapped(torch.autocast, "__init__", _for_cpu(torch.autocast.__init__)))
        yield


def _for_cpu(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def begin(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return begin


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def registered(key: str) -> set[str]:
    """The operators that have a kernel of their own for a dispatch key, as ``softmax.int``."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


def _op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _plain() -> Any:
    """Inside, autocast is passed by, as in its own kernels."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def _eligible(x: Any) -> bool:
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return is_float and x.device.type == "cpu" and x.dtype is not torch.float64


def _cast(op: Any, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    cast = functools.partial(tree_map_only, Tensor, lambda x: x.to(dtype) if _eligible(x) else x)
    return op(*cast(args), **cast(kwargs))


# The policies, as the specializations of WrapFunction_ in autocast_mode.h.


def _float32(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _plain():
            return _cast(_op(name), torch.float32, args, kwargs)

    return run


def _low(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _plain():
            return _cast(_op(name), torch.get_autocast_dtype("cpu"), args, kwargs)

    return run


def _widest(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if _eligible(x)]
        wide = any(x.dtype is torch.float32 for x in tensors)
        with _plain():
            return _cast(_op(name), torch.float32 if wide else torch.get_autocast_dtype("cpu"), args, kwargs)

    return run


def _float32_result(name: str) -> Callable[..., Any]:
    op = _op(name)
    position = [argument.name for argument in op._schema.arguments].index("dtype")

    def run(*args: Any, **kwargs: Any) -> Any:
        if _eligible(args[0]):
            given = args[position] if len(args) > position else kwargs.get("dtype")
            args, kwargs = args[:position], {**kwargs, "dtype": torch.float32 if given is None else given}
        with _plain():
            return op(*args, **kwargs)

    return run


def _other_overload(name: str) -> Callable[..., Any]:
    op = _op(OTHER_OVERLOAD[name])
    names = [argument.name for argument in _op(name)._schema.arguments]
    defaults = {"p": 2, "keepdim": False}

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        values = [given.get(key, defaults.get(key)) for key in names]
        with _plain():
            return op(*values, dtype=torch.float32 if _eligible(args[0]) else args[0].dtype)

    return run


def _banned(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"CUDA's autocast refuses {name}: use binary_cross_entropy_with_logits (BCEWithLogitsLoss)")

    return run
