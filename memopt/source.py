"""What the code of a module's class says: finds calls in it without running it.

A plan has no inputs to run a model with, and tracing stops at the first branch on a value. The source of the class,
read as a syntax tree, shows all its branches. What is found is where to look when the model runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator

_OUTER = re.compile(r"(\w)(\w),\1(\w)->\1(\2\3|\3\2)")


@functools.lru_cache(maxsize=4096)
def code_of(cls: type) -> tuple[ast.AST, ...]:
    """The syntax trees of a class and its bases, without those of torch itself; empty where there is no source."""
    trees = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins", "typing"):
            continue
        try:
            trees.append(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError, SyntaxError):  # made in an interpreter, or by code
            continue
    return tuple(trees)


def calls(cls: type) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a class's code with the last part of their names: ``einsum`` for ``torch.einsum(...)``."""
    for tree in code_of(cls):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func
                yield (name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")), node


def makes_outer_product(cls: type) -> bool:
    """Whether the code of a class may make a rank-one product of two matrices' rows."""
    for name, call in calls(cls):
        first = call.args[0] if call.args else None
        if name == "einsum" and isinstance(first, ast.Constant) and isinstance(first.value, str):
            if _OUTER.fullmatch(first.value.replace(" ", "")):
                return True
        elif name in ("bmm", "matmul", "mul", "multiply") and all(map(_widened, _operands(call))):
            return True
    return any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, (ast.Mult, ast.MatMult))
        and _widened(node.left)
        and _widened(node.right)
        for tree in code_of(cls)
        for node in ast.walk(tree)
    )


def writes_attention(cls: type, *equivalents: str) -> bool:
    """Whether the code of a class has a softmax, or a call equivalent to one, and products of matrices."""
    names = {name for name, _ in calls(cls)}
    products = names & {"einsum", "bmm", "matmul", "baddbmm"} or any(
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
        for tree in code_of(cls)
        for node in ast.walk(tree)
    )
    return bool(names & {"softmax", *equivalents}) and bool(products)


def _operands(call: ast.Call) -> list[ast.expr]:
    """Both factors of a function or method of two."""
    if isinstance(call.func, ast.Attribute) and len(call.args) == 1:
        return [call.func.value, call.args[0]]
    return call.args[:2]


def _widened(node: ast.expr) -> bool:
    """``x[:, None]`` or ``x.unsqueeze(1)``."""
    if isinstance(node, ast.Subscript):
        return any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node.slice))
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("unsqueeze", "view", "reshape")
    )
