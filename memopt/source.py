"""What the code of a module's class says: finds calls in it without running it.

A plan has no inputs to run a model with, and tracing stops at the first branch on a value. The source of the class,
read as a syntax tree, shows all its branches; functions that it names are read, too. Where there is no source, as for
what was typed into an interpreter, the compiled code says nearly as much. What is found is where to look when the model
runs.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

_PRODUCTS = {"einsum", "bmm", "matmul", "baddbmm"}

Code = tuple[ast.AST, ...]
"""Syntax trees that belong together: a class's own and its bases', a method's, with those of functions they name."""


def makes_outer_product(cls: type) -> bool:
    """Whether the code of a class may make a rank-one product of two matrices' rows."""
    return _squares(tuple(tree for _, code in _classes(cls) for tree in code))


def outer_products(cls: type) -> list[str]:
    """The methods of a class whose code may make a rank-one product of two matrices' rows."""
    return [name for name, code in _methods(cls).items() if _squares(code)]


@functools.lru_cache(maxsize=4096)
def names_in(cls: type) -> frozenset[str]:
    """The names in the code of a class, and in that of functions which it names."""
    return frozenset(_names(tuple(tree for _, code in _classes(cls) for tree in code)))


def writes_attention(cls: type, helper: type | None = None) -> bool:
    """Whether the code of a class that ``forward`` leads to has a softmax and products of matrices.

    Args:
        helper: another class to which forward leads, which may lead back.
    """
    code = tuple(tree for trees in _reached(cls, helper).values() for tree in trees)
    return "softmax" in _names(code) and _multiplies(code)


def matrix_products(cls: type, helper: type | None = None) -> list[str]:
    """The methods of a class that ``forward`` leads to and whose code multiplies matrices."""
    return [name for name, code in _reached(cls, helper).items() if name and _multiplies(code)]


@functools.lru_cache(maxsize=4096)
def _reached(cls: type, helper: type | None) -> dict[str, Code]:
    """The methods that forward leads to, by name; the helper's code without one."""
    methods, found = _methods(cls), {}
    if helper is not None:
        found[""] = tuple(tree for _, code in _classes(helper) for tree in code)
    coming = ["forward", *sorted(_names(found.get("", ())))]
    while coming:
        name = coming.pop()
        if name in methods and name not in found:
            found[name] = methods[name]
            coming += sorted(_names(found[name]))
    return found


@functools.lru_cache(maxsize=4096)
def _methods(cls: type) -> dict[str, Code]:
    """The code of a class's plain methods by name, that of bases with it."""
    found: dict[str, Code] = {}
    for base, code in _classes(cls):
        for home in ast.walk(code[0]):
            for item in home.body if isinstance(home, ast.ClassDef) else ():
                name = getattr(item, "name", "")
                if isinstance(inspect.getattr_static(cls, name, None), types.FunctionType):
                    found[name] = (*found.get(name, ()), *_with_functions(item, base.__module__))
    return found


@functools.lru_cache(maxsize=4096)
def _classes(cls: type) -> tuple[tuple[type, Code], ...]:
    """A class and its bases, without those of torch itself."""
    trees = ((base, _tree(base)) for base in cls.__mro__)
    return tuple((base, _with_functions(tree, base.__module__)) for base, tree in trees if tree is not None)


def _with_functions(tree: ast.AST, module: str) -> Code:
    """A syntax tree, and those of the functions that it names, and that these name; further away are utilities."""
    found: dict[types.FunctionType, ast.AST] = {}
    named = _functions_in(tree, module)
    for _ in range(2):
        new = {f: code for f in named if f not in found and (code := _tree(f)) is not None}
        found |= new
        named = tuple(other for function in new for other in _named_by(function))
    return (tree, *found.values())


@functools.lru_cache(maxsize=16384)
def _named_by(function: types.FunctionType) -> tuple[types.FunctionType, ...]:
    tree = _tree(function)
    return () if tree is None else _functions_in(tree, function.__module__)


def _functions_in(tree: ast.AST, module: str) -> tuple[types.FunctionType, ...]:
    """What a name, or a name in a module of that name, stands for in the module that the code is from."""
    known = vars(sys.modules[module]) if module in sys.modules else {}
    found: dict[types.FunctionType, None] = {}
    for node in ast.walk(tree):
        value: Any = None
        if isinstance(node, ast.Name):
            value = known.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home = known.get(node.value.id)
            value = vars(home).get(node.attr) if isinstance(home, types.ModuleType) else None
        if isinstance(value, types.FunctionType):
            found[value] = None
    return tuple(found)


@functools.lru_cache(maxsize=16384)
def _tree(item: Any) -> ast.AST | None:
    """The syntax tree of a class or function; None for torch's and Python's own."""
    home = (item.__module__ or "").partition(".")[0]
    if home in {"torch", *sys.stdlib_module_names} - {"builtins"}:
        return None
    found = _definitions(item.__module__).get(item.__qualname__)
    if found is not None:
        return found
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(item)))
    except (OSError, TypeError, SyntaxError):  # typed into an interpreter, or made by code
        return _compiled_class(item) if isinstance(item, type) else _compiled(item)


@functools.lru_cache(maxsize=1024)
def _definitions(module: str) -> dict[str, ast.AST]:
    """All classes and functions in a module's source by their qualified names; several of a name come as one tree.

    Reading a module once is many times faster than ``inspect.getsource`` for each of its classes.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, list[ast.stmt]] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.setdefault(prefix + child.name, []).append(child)
                local = "." if isinstance(child, ast.ClassDef) else ".<locals>."
                collect(child, prefix + child.name + local)
            else:
                collect(child, prefix)

    collect(tree, "")
    return {name: ast.Module(body=nodes, type_ignores=[]) for name, nodes in found.items()}


def _compiled_class(cls: type) -> ast.AST:
    methods: list[ast.stmt] = [
        _compiled(value) for value in vars(cls).values() if isinstance(value, types.FunctionType)
    ]
    return ast.ClassDef(name=cls.__name__, bases=[], keywords=[], body=methods, decorator_list=[])


def _compiled(function: types.FunctionType) -> ast.FunctionDef:
    """A tree with the names, texts and products in a function's compiled code, in no order."""
    found: list[ast.expr] = []

    def collect(code: types.CodeType) -> None:
        found.extend(ast.Name(id=name) for name in code.co_names)
        texts: list[ast.expr] = [ast.Constant(value=value) for value in code.co_consts if isinstance(value, str)]
        instructions = list(dis.get_instructions(code))
        operations = {instruction.opname for instruction in instructions}
        # Operands are not told apart: any could be one that gets a dimension, if something here does.
        widens = "unsqueeze" in code.co_names or {"BUILD_SLICE", "BUILD_TUPLE"} <= operations
        widens |= any(isinstance(value, tuple) and None in value for value in code.co_consts)
        name = "unsqueeze" if widens else ""
        operand: ast.expr = ast.Call(func=ast.Name(id=name), args=[], keywords=[])
        for name in code.co_names:
            given = texts if name == "einsum" else [operand, operand]
            found.append(ast.Call(func=ast.Name(id=name), args=given, keywords=[]))
        for instruction in instructions:
            if instruction.argrepr == "@" or instruction.opname == "BINARY_MATRIX_MULTIPLY":  # Python 3.10
                found.append(ast.BinOp(left=operand, op=ast.MatMult(), right=operand))
            elif instruction.argrepr == "*" or instruction.opname == "BINARY_MULTIPLY":
                found.append(ast.BinOp(left=operand, op=ast.Mult(), right=operand))
        for value in code.co_consts:
            if isinstance(value, types.CodeType):
                collect(value)

    collect(function.__code__)
    body: list[ast.stmt] = [ast.Expr(value=value) for value in found]
    return ast.FunctionDef(name=function.__name__, args=_NO_ARGUMENTS, body=body, decorator_list=[])


_NO_ARGUMENTS = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])


def _squares(code: Code) -> bool:
    for node in _nodes(code):
        if isinstance(node, ast.Call):
            name, operands = _name(node.func), _operands(node)
            if name == "einsum" and any(map(_outer_equation, node.args)):
                return True
            if name in ("bmm", "matmul", "mul", "multiply") and len(operands) == 2 and all(map(_widened, operands)):
                return True
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.MatMult)):
            operands = [node.left, node.right]
            if all(map(_widened, operands)):
                return True
    names = _names(code)
    return "vmap" in names and "outer" in names


def _multiplies(code: Code) -> bool:
    return bool(_names(code) & _PRODUCTS) or any(
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) for node in _nodes(code)
    )


def _nodes(code: Code) -> Iterator[ast.AST]:
    return (node for tree in code for node in ast.walk(tree))


def _names(code: Code) -> set[str]:
    return {_name(node) for node in _nodes(code)}


def _name(node: ast.AST) -> str:
    """The last part of a name: ``einsum`` for ``torch.einsum``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _outer_equation(node: ast.expr) -> bool:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    # As torch writes them, "ab,ac->abc", or einops, "batch i, batch j -> batch i j".
    name = r"\.\.\.|\w+" if " " in node.value.replace(", ", "").replace(" -> ", "") else r"\.\.\.|\w"
    parts = [re.findall(name, part) for part in re.split(",|->", node.value)]
    if [len(part) for part in parts] != [2, 2, 3]:
        return False
    (n, i), (m, j), out = parts
    return n == m and i != j and out in ([n, i, j], [n, j, i])


def _operands(call: ast.Call) -> list[ast.expr]:
    """Both factors of a function or method of two."""
    if isinstance(call.func, ast.Attribute) and len(call.args) == 1:
        return [call.func.value, call.args[0]]
    return call.args[:2]


def _widened(node: ast.expr) -> bool:
    """``x[:, None]`` or ``x.unsqueeze(1)``."""
    if isinstance(node, ast.Subscript):
        return any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node.slice))
    return isinstance(node, ast.Call) and _name(node.func) in ("unsqueeze", "view", "reshape")
