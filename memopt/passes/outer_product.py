"""The outer product of a condition with itself, without making it.

A condition c [N, D] that a model squares to c (x) c [N, D, D] is usually read by linear maps, and these by attention
as D more tokens. All of that depends on c alone: a linear map W of the product is (W c) (x) c, and attention over its
columns needs two numbers per query (memopt.ops.rank_one). The product, the maps' results [N, C, D] and the attention's
weights for the D tokens [N, T, D] are never made.

The pass finds the product in the code of the modules' classes and lets it be deferred while they run (memopt.deferred);
what becomes of it shows in the run, and what no rule knows is given the product itself, made then. Rows that are not
zero are not told from those that are: a row without a condition costs and loses nothing.

``mode="sparse"`` instead makes the product of the non-zero rows only, stores these, and gives the other rows what a
linear map makes of zero, its bias. It waits for the device to count the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from memopt.core import Edit
from memopt.deferred import Products, counting, entered, followed
from memopt.errors import InputError, MemoptError
from memopt.registry import Claim, Context, Pass
from memopt.source import makes_outer_product, outer_products

PART = "outer product"


@dataclass(frozen=True, kw_only=True)
class OuterProduct(Pass):
    """Conditions that are squared to c (x) c: the product, its linear maps and attention over them are not made."""

    name = "outer_product"
    stage = "rewrite"
    exact = True
    rounding = True
    needs = (
        "a product of each row of a matrix with itself or another: einsum('ab,ac->abc', c, c), "
        "c[:, :, None] * c[:, None, :] or bmm(c.unsqueeze(2), c.unsqueeze(1)) in the code of a module"
    )

    mode: Literal["rank_one", "sparse", "dense"] = "rank_one"
    """rank_one: never made; sparse: made for the rows that are not zero; dense: as the model does, for comparison."""
    zero_threshold: float = 0.0
    """sparse: a row counts as zero if none of its entries is larger than this."""
    check_finite: bool = False
    """Raise where a condition is not finite. Waits for the device."""

    def __post_init__(self) -> None:
        if self.mode not in ("rank_one", "sparse", "dense"):
            raise InputError(f"outer_product: mode {self.mode!r} is not one of rank_one, sparse, dense")
        if not 0 <= self.zero_threshold < float("inf"):
            raise InputError(f"outer_product: zero_threshold must be at least 0, not {self.zero_threshold}")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        return [
            Claim(path, "graph", PART) for path, module in model.named_modules() if makes_outer_product(type(module))
        ]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        tell = counting(edit.counts)
        for claim in claims:
            check = _finite_in(claim.path) if self.check_finite else None
            if self.mode == "dense" and check is None:
                continue
            follow, module = self._follow(tell, check), edit.module(claim.path)
            # Also the methods themselves: a model may call them again in backward.
            for method in sorted({"forward", *outer_products(type(module))}):
                edit.wrap(module, method, follow)
        # A module may hand its product on; only what leaves the model must be a tensor.
        edit.wrap(edit.model, "forward", entered)

    def _follow(self, tell: Callable[[str], None], check: Callable[[Tensor], None] | None) -> Callable[..., Any]:
        rows = self.zero_threshold if self.mode == "sparse" else None

        def follow(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            mode = Products(tell, check, rows, defer=self.mode != "dense")
            return followed(mode, module, inner, *args, **kwargs)

        return follow


def _finite_in(path: str) -> Callable[[Tensor], None]:
    def check(condition: Tensor) -> None:
        if not condition.isfinite().all():
            what = "NaN" if condition.isnan().any() else "an infinite value"
            raise MemoptError(f"{what} detected in the condition that {path or 'the model'} squares")

    return check
