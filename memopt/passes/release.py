"""Intermediates that a module's code never uses again but still holds by a local name are freed at once.

What careful people write by hand as ``del h``, found by liveness of the names in the code of ``forward`` and of the
methods that it calls (memopt.liveness). Nothing that is computed changes, only when memory comes back.

Python frees much by itself: ``h = f(h)`` frees the old h after the call, what a function held goes when it returns, a
value without a name is held by nobody. And in training, autograd keeps what backward needs whatever Python forgets. So
what is left is chiefly in inference, and in blocks under a checkpoint.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memopt import legacy
from memopt.core import Edit
from memopt.liveness import released
from memopt.registry import Claim, Context, Pass


@dataclass(frozen=True, kw_only=True)
class Release(Pass):
    """Intermediates that code holds by a local name after their last use are freed there."""

    name: ClassVar[str] = "release"
    stage: ClassVar = "rewrite"
    exact: ClassVar[bool] = True
    needs: ClassVar[str] = (
        "modules whose forward, or a method it calls, computes something after the last use of what a local name holds "
        "(h = f(x); y = g(h); return k(y)), and whose source can be read"
    )

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        paths = [path for path, module in model.named_modules() if _releases(module)]
        return [Claim(path, "graph", "locals") for path in paths]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        total = 0
        for claim in claims:
            module = edit.module(claim.path)
            for method, (function, names) in _releases(module).items():
                edit.wrap(module, method, legacy.instead(function))
                # The function itself: the frame of a wrapper would hold the arguments while it runs.
                setattr(type(module), method, function)
                total += len(names)
        edit.note(f"local names released after their last use: {total} in {len(claims)} modules")


def _releases(module: nn.Module) -> dict[str, tuple[types.FunctionType, tuple[str, ...]]]:
    """What to put in place of which methods, with the names that it releases."""
    found = {method: released(getattr(type(module), method)) for method in _reached(module)}
    return {method: new for method, new in found.items() if new is not None}


def _reached(module: nn.Module) -> Iterator[str]:
    """Forward, and the methods of its class that it names, and that these name; without torch's own."""
    seen, coming = set(), ["forward"]
    while coming:
        method = coming.pop()
        function = inspect.getattr_static(type(module), method, None)
        if method in seen or method in vars(module) or not isinstance(function, types.FunctionType):
            continue
        seen.add(method)
        inner = inspect.unwrap(function)
        if not isinstance(inner, types.FunctionType) or inner.__module__.partition(".")[0] == "torch":
            continue
        yield method
        coming += sorted(inner.__code__.co_names)
