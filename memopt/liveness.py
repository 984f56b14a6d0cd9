"""Functions that forget a local name after its last use, as careful people write ``del h`` by hand.

A tensor that a local name holds lives until the function returns or binds the name again, however long ago it was used
last. Here the source of a function is read as a syntax tree, liveness of its names is computed backwards over the
statements (a name is alive where some path may read it before binding it), and ``name = None`` is put in where a name
dies: after the statement of its last use, and at the start of a branch on which it is dead. (``del`` would raise where
a name is not bound. A read that has to raise UnboundLocalError is a read, so the name is alive there.)

Everything else stays: the whole file is compiled, once as it is and once changed, so closures, ``super()``, mangled
names, ``__future__`` and lines of tracebacks come out as they were. The first result must equal the code that runs;
where it does not (changed on disk, made by code, assertions rewritten), the function is left alone. The second becomes
a copy of the function with the same globals, cells and defaults. Of a decorated function the innermost is changed, and
a copy of its decorators' wrappers calls it, if these keep it in a closure cell as ``functools.wraps`` wrappers do.

Names are never touched that a nested function, lambda or comprehension mentions, that are bound by ``with``,
``except``, ``import``, ``def`` or ``match``, that are never read (a guard may live there), or that only hold sizes,
constants and what ``self`` holds anyway. Neither are functions that look at their own names, or at when objects die.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import linecache
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Names: TypeAlias = frozenset[str]
NONE: Names = frozenset()

_LOOKS = "locals vars eval exec dir _getframe currentframe inspect breakpoint set_trace"
_MINDS = "id weakref ref finalize gc getrefcount data_ptr ctypes tempfile Stream stream current_stream"
LEAVE_ALONE: Names = NONE.union(_LOOKS.split(), _MINDS.split())
"""What a function names that looks at its own names, or minds when objects die: addresses, weak references, files that
go with their object, memory that another stream may still read."""

WORK = "<work>"
"""Alive, as if it were a name, where something is still to be computed: elsewhere nothing is gained by forgetting."""

_SIZES = "shape size dim ndim numel dtype device len int float bool str isinstance hasattr"
_MAKERS = "range enumerate zip reversed list tuple dict set"
_SMALL: Names = NONE.union(_SIZES.split())
_CHEAP: Names = _SMALL.union(_MAKERS.split())
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, *_COMPREHENSIONS)
_BUILT = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List, ast.Starred)
_LAST = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Delete)  # nothing is to be forgotten after these
_TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))  # from Python 3.11


def released(function: Any) -> tuple[types.FunctionType, tuple[str, ...]] | None:
    """A copy of a function that forgets names after their last use, and these names; None if there are none."""
    if not isinstance(function, types.FunctionType):
        return None
    inner = function.__dict__.get("__wrapped__")
    if inner is None:
        code = function.__code__
        text = "".join(linecache.getlines(code.co_filename, function.__globals__))
        found = _rewritten(code.co_filename, text).get((code.co_name, code.co_firstlineno))
        if found is None or not _same(found.before, code) or found.after.co_freevars != code.co_freevars:
            return None
        return _copy(function, found.after, function.__closure__), found.names
    changed = released(inner)
    cells = function.__closure__ or ()
    if changed is None or not any(_holds(cell, inner) for cell in cells):
        return None
    closure = tuple(types.CellType(changed[0]) if _holds(cell, inner) else cell for cell in cells)
    wrapper = _copy(function, function.__code__, closure)
    wrapper.__dict__["__wrapped__"] = changed[0]
    return wrapper, changed[1]


def _copy(function: types.FunctionType, code: types.CodeType, closure: Any) -> types.FunctionType:
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__dict__["__wrapped__"]
    return copy


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


@dataclass(frozen=True)
class _Rewritten:
    before: types.CodeType
    after: types.CodeType
    names: tuple[str, ...]


@functools.lru_cache(maxsize=256)
def _rewritten(filename: str, text: str) -> dict[tuple[str, int], _Rewritten]:
    """The functions of a file that something can be done for, by their names and first lines."""
    names: dict[tuple[str, int], tuple[str, ...]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file's syntax: given when it was imported
        try:
            tree = ast.parse(text, filename)
            before = _codes(compile(tree, filename, "exec", dont_inherit=True))
            for node in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
                if dead := release(node):
                    names[node.name, min([node.lineno, *(one.lineno for one in node.decorator_list)])] = dead
            after = _codes(compile(tree, filename, "exec", dont_inherit=True))
        except (SyntaxError, ValueError, RecursionError):  # no Python file, or nested too deeply
            return {}
    return {key: _Rewritten(before[key], after[key], dead) for key, dead in names.items() if key in before}


def _codes(code: types.CodeType) -> dict[tuple[str, int], types.CodeType]:
    found = {(code.co_name, code.co_firstlineno): code}
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            found |= _codes(value)
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two constants of compiled code are equal; ``==`` of code looks at what the interpreter noted in it."""
    if not isinstance(a, types.CodeType) or not isinstance(b, types.CodeType):
        return type(a) is type(b) and bool(a == b)
    parts = ("co_code", "co_names", "co_varnames", "co_cellvars", "co_freevars", "co_flags", "co_argcount")
    return (
        all(getattr(a, part) == getattr(b, part) for part in parts)
        and len(a.co_consts) == len(b.co_consts)
        and all(map(_same, a.co_consts, b.co_consts))
    )


def release(function: ast.FunctionDef) -> tuple[str, ...]:
    """Put ``name = None`` into a function's tree wherever one of its names dies with work still to do.

    Returns:
        The names for which that was done; empty if the tree is as it was.
    """
    names = _candidates(function)
    liveness = _Liveness()
    liveness.block(function.body, NONE, _Exits())
    done: set[str] = set()

    def forget(dead: Names, line: int) -> list[ast.stmt]:
        done.update(dead & names)
        targets: list[ast.expr] = [ast.Name(id=name, ctx=ast.Store()) for name in sorted(dead & names)]
        place: Any = {"lineno": line, "col_offset": 0, "end_lineno": line, "end_col_offset": 0}
        statement = ast.Assign(targets=targets, value=ast.Constant(value=None), **place)
        return [ast.fix_missing_locations(statement)] if targets else []

    for node in [n for n in ast.walk(function) if names]:
        for part in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, part, None), list):
                body[:] = [
                    one
                    for statement in body
                    for one in (
                        *forget(liveness.before.get(statement, NONE), statement.lineno),
                        statement,
                        *forget(liveness.after.get(statement, NONE), statement.end_lineno or statement.lineno),
                    )
                ]
    return tuple(sorted(done))


def _candidates(function: ast.FunctionDef) -> Names:
    """The names of a function that may be forgotten, and that may hold something worth it."""
    nodes = list(ast.walk(function))
    named = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    if named & LEAVE_ALONE or any(isinstance(n, ast.Yield | ast.YieldFrom | ast.Await) for n in nodes):
        return NONE
    untouched: set[str] = set()
    unpacked: set[str] = set()
    values: list[tuple[Names, ast.expr]] = []
    for node in nodes:
        if isinstance(node, _SCOPES) and node is not function:
            # The first iterable of a comprehension belongs to the function itself.
            outside = set(ast.walk(node.generators[0].iter)) if isinstance(node, _COMPREHENSIONS) else set()
            untouched |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n not in outside}
        if isinstance(node, ast.Global | ast.Nonlocal):
            untouched |= set(node.names)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            untouched |= _stored(node.optional_vars)
        elif isinstance(node, ast.alias):
            untouched.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.MatchMapping):
            untouched.add(node.rest or "")
        elif isinstance(node, ast.ExceptHandler | ast.FunctionDef | ast.ClassDef | ast.MatchAs | ast.MatchStar):
            untouched.add(node.name or "")
        elif isinstance(node, ast.Assign):
            values += [(_stored(target), node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            values.append((_stored(node.target), node.value))
        elif isinstance(node, ast.For):
            values.append((_stored(node.target), node.iter))
        elif isinstance(node, ast.Tuple | ast.List):
            unpacked |= _stored(node)
    arguments = function.args
    first, *others = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, ast.arg(arg="")]
    # Module.__call__ holds what it gives to forward; a method may be the only holder of what it is given.
    given = NONE | {argument.arg for argument in others if function.name != "forward"}
    bound = given.union(*(names for names, _ in values))
    plain = _plain_names(bound - given - {argument.arg for argument in others}, first.arg, values)
    read = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    return (bound & (read | unpacked)) - plain - untouched - {first.arg}


def _plain_names(names: Names, first: str, values: Sequence[tuple[Names, ast.expr]]) -> Names:
    """Those of the names that only ever hold sizes, constants and what the first argument (``self``) holds."""
    larger = NONE.union(*(bound for bound, value in values if not _plain(value, names | {first})))
    return _plain_names(names - larger, first, values) if names & larger else names


def _plain(node: ast.AST, names: Names) -> bool:
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute | ast.Subscript):
        return _name(node) in _SMALL or _plain(node.value, names)
    if isinstance(node, ast.Call):
        return _name(node.func) in _SMALL or (_name(node.func) in _CHEAP and all(_plain(a, names) for a in node.args))
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn):
        return True
    if isinstance(node, _BUILT):
        return all(_plain(child, names) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
    return isinstance(node, ast.Constant | ast.JoinedStr)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _stored(node: ast.AST) -> Names:
    return NONE | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _uses(*nodes: ast.AST | None) -> Names:
    """Names that are read (or deleted, which needs them, too), and whether something is computed."""
    every = [n for node in nodes if node is not None for n in ast.walk(node)]
    changed = NONE.union(*(_stored(n.target) for n in every if isinstance(n, ast.AugAssign)))
    read = {n.id for n in every if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    return changed | read | ({WORK} if any(map(_works, every)) else NONE)


def _works(node: ast.AST) -> bool:
    """A computation: not the making of a small object, nor of one of a class, such as what a model returns."""
    if isinstance(node, ast.Call):
        name = _name(node.func)
        return name not in _CHEAP and not (isinstance(node.func, ast.Name) and name[:1].isupper())
    return isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.AugAssign)


@dataclass(frozen=True)
class _Exits:
    """What is alive where a statement may jump to."""

    error: Names = NONE
    """Where an exception leads; the way of ``return``, through every ``finally``, is one of these."""
    out: Names = NONE
    """Where ``break`` leads."""
    again: Names = NONE
    """Where ``continue`` leads."""


class _Liveness:
    """Where the names of a function die; in doubt a name is alive.

    Loops are gone through until nothing changes; the last time counts, so results are written down each time.
    """

    def __init__(self) -> None:
        self.after: dict[ast.stmt, Names] = {}
        self.before: dict[ast.stmt, Names] = {}

    def block(self, body: Sequence[ast.stmt], alive: Names, exits: _Exits) -> Names:
        """What is alive at the start of some statements, given what is at their end."""
        alive |= exits.error  # between any two, too: an interrupt may come everywhere
        for statement in reversed(body):
            start = self.statement(statement, alive, exits) | exits.error
            if WORK in alive and not isinstance(statement, _LAST):
                self.after[statement] = (start | _stored(statement)) - alive
            alive = start
        return alive

    def enter(self, body: Sequence[ast.stmt], before: Names, start: Names) -> None:
        """Note what dies on the way into a branch."""
        if body and WORK in start:
            self.before[body[0]] = before - start

    def statement(self, node: ast.stmt, alive: Names, exits: _Exits) -> Names:
        match node:
            case ast.If():
                starts = [self.block(body, alive, exits) for body in (node.body, node.orelse)]
                return self.branches(_uses(node.test), (node.body, node.orelse), starts)
            case ast.Match():
                starts = [self.block(case.body, alive, exits) for case in node.cases]
                asked = _uses(node.subject, *(part for case in node.cases for part in (case.pattern, case.guard)))
                return self.branches(alive | asked, [case.body for case in node.cases], starts)
            case ast.For():
                return _uses(node.iter) | self.loop(node, _uses(node.target), _stored(node.target), alive, exits)
            case ast.While():
                return self.loop(node, _uses(node.test), NONE, alive, exits)
            case ast.With():  # an error may end at its end
                inner = dataclasses.replace(exits, error=exits.error | alive)
                return _uses(*node.items) | self.block(node.body, alive, inner)
            case ast.Return() | ast.Raise():
                return _uses(node)
            case ast.Break():
                return exits.out
            case ast.Continue():
                return exits.again
            case ast.Assign():
                return (alive - _bound(node.targets)) | _uses(node)
            case ast.AnnAssign(value=ast.expr()):
                return (alive - _bound([node.target])) | _uses(node)
        if isinstance(node, _TRIES):
            return self.attempt(node, alive, exits)
        return alive | _uses(node)

    def branches(self, asked: Names, bodies: Iterable[Sequence[ast.stmt]], starts: Sequence[Names]) -> Names:
        before = asked.union(*starts)
        for body, start in zip(bodies, starts, strict=True):
            self.enter(body, before, start)
        return before

    def loop(self, node: ast.For | ast.While, asked: Names, bound: Names, alive: Names, exits: _Exits) -> Names:
        last = self.block(node.orelse, alive, exits)
        head = last | asked
        while True:
            start = self.block(node.body, head, dataclasses.replace(exits, out=alive, again=head))
            if start - bound <= head:
                break
            head |= start - bound
        self.enter(node.body, head | bound, start)
        self.enter(node.orelse, head | _stored(node), last)
        return head

    def attempt(self, node: Any, alive: Names, exits: _Exits) -> Names:
        if node.finalbody:
            alive |= exits.out | exits.again  # and errors, as everywhere
            alive = self.block(node.finalbody, alive, exits)
            exits = dataclasses.replace(exits, error=alive)
        starts = [self.block(handler.body, alive, exits) for handler in node.handlers]
        tried = NONE.union(*(_uses(statement) | _stored(statement) for statement in node.body))
        self.branches(tried, [handler.body for handler in node.handlers], starts)
        caught = exits.error.union(*starts, _uses(*(handler.type for handler in node.handlers)))
        passed = self.block(node.orelse, alive, exits)
        return self.block(node.body, passed, dataclasses.replace(exits, error=caught))


def _bound(targets: Iterable[ast.expr]) -> Names:
    """Names that an assignment surely binds; one in an index (``x[y := 1] = 2``) may be read before."""
    return NONE.union(*(NONE | set(_targets(target)) for target in targets))


def _targets(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Starred):
        yield from _targets(target.value)
    elif isinstance(target, ast.Tuple | ast.List):
        for one in target.elts:
            yield from _targets(one)
