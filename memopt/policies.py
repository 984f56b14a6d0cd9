"""What a checkpoint keeps of a block's inside: one table of operation families, for each policy kept or made again.

Names are those of the operators that torch's kernels are called by, below autograd: `aten.mm`, not `torch.matmul`,
which comes down to it, as einsum does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from memopt.errors import InputError

Keeps = Callable[..., bool]
"""Whether the result of an operation is kept: a function of the operator and its arguments."""

FAMILIES = {
    "convolutions": "convolution convolution_overrideable cudnn_convolution_relu cudnn_convolution_add_relu",
    "matrix products": (
        "mm bmm addmm baddbmm addbmm mv addmv dot linear _addmm_activation _scaled_mm _grouped_mm _int_mm"
    ),
    "attention": (
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward "
        "_cudnn_attention_forward"
    ),
    "recurrent layers": "_cudnn_rnn mkldnn_rnn_layer miopen_rnn _thnn_fused_lstm_cell _thnn_fused_gru_cell",
    "all else": "",
}
"""Operations by kind. "All else" is norms, activations, dropout, casts, sums and products of elements, copies,
concatenation, interpolation, pooling, softmax, look-ups."""

POLICIES: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "cheap": frozenset({"convolutions", "matrix products", "attention", "recurrent layers"}),
    "skips": frozenset(),
}
"""The families whose results each policy keeps. What leaves a block is kept by whoever needs it, under any policy;
"skips" draws the blocks larger, so that less leaves one."""


def table() -> str:
    """The policies as text: a row for each family."""
    rows = [("family of operations", *POLICIES)]
    rows += [(family, *("kept" if family in kept else "again" for kept in POLICIES.values())) for family in FAMILIES]
    return "\n".join("".join(cell.ljust(24 if i == 0 else 8) for i, cell in enumerate(row)).rstrip() for row in rows)


def keeps_of(policy: str | Keeps) -> Keeps | None:
    """The function that a policy's name stands for; None where it keeps nothing."""
    if callable(policy):
        return _checked(policy)
    kept = POLICIES[policy]
    names = frozenset(name for family in kept for name in FAMILIES[family].split())
    if not names:
        return None

    @functools.cache
    def named(op: Any) -> bool:
        return op.namespace == "aten" and op._schema.name[6:] in names

    def keeps(op: Any, *args: Any, **kwargs: Any) -> bool:
        return named(op)

    return keeps


def check_policy(policy: object) -> None:
    """Raise an InputError unless it is the name of a policy or a function."""
    if not callable(policy) and (not isinstance(policy, str) or policy not in POLICIES):
        raise InputError(
            f"checkpoint: policy {policy!r} is none of {', '.join(POLICIES)}, nor a function of an operation "
            "(a torch.ops operator, its arguments) that says whether its result is kept"
        )


def _checked(policy: Keeps) -> Keeps:
    def keeps(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> bool:
        answer: Any = policy(op, *args, **kwargs)
        if not isinstance(answer, bool):
            raise InputError(f"checkpoint: the policy must answer True or False for {op}, not {answer!r}")
        return answer

    return keeps
