"""Apply passes to a model in place, and take them off again.

A *pass* is a frozen dataclass, its own configuration, with two methods. ``plan`` looks at the untouched model and
answers with *claims*: which aspect of which module it will change. ``apply`` then changes the model, but only through
an :class:`Edit`, whose every verb writes its inverse into a journal.

``apply(model, passes)`` collects the claims of all passes before anything changes (an empty plan, a conflict or a bad
argument therefore costs nothing), orders the passes by stage, applies them, and unwinds the journal if anything raises.
``Handle.undo`` unwinds it later.

What is active on a model lives in one :class:`_Session`. Adding passes to a model that has some, or removing some in
any order, is one and the same transition: unwind everything, plan the new set on the untouched model, apply it. So
the result never depends on history, and every plan sees the model as its author wrote it.

Behaviour is changed by a *dynamic subclass*: ``module.__class__`` is set to a subclass made on the spot, as FSDP2 and
``torch.nn.utils.parametrize`` do. ``isinstance``, keys, hooks and ``deepcopy`` keep working, the root module needs no
special case, and undoing is setting the class back. A ``forward`` patched onto the instance has none of these. Only
pickle, which looks classes up by name, is refused.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from memopt.conflicts import between
from memopt.errors import AlreadyApplied, InputError, MemoptError, NothingToDo, PassConflict
from memopt.registry import STAGES, Claim, Context, Pass, exactness, resolve
from memopt.reports import Report, ReportRow, Saving

if TYPE_CHECKING:
    from memopt.planning.plans import Plan

PHASES = ("sampling", "evaluation", "checkpoint")
"""The boundaries a training loop names with ``handle.phase(name)``."""

_SESSION = "_memopt_session"  # in the root module's __dict__ while passes are active, gone after the last undo
_MARK = "_memopt_base"  # in the namespace of a dynamic subclass: the class underneath


@dataclass(eq=False)  # an entry is this one, not any with the same pass
class _Entry:
    """A pass that is active on a model, with what it found and what it keeps while it is active."""

    pass_: Pass
    missing: str
    optimizers: tuple[torch.optim.Optimizer, ...]
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    state: dict[str, Any] = field(default_factory=dict)


class Edit:
    """The only way a pass changes a model: every verb records how to take it back."""

    def __init__(self, session: _Session, entry: _Entry) -> None:
        self.model: nn.Module = session.model
        self.optimizers = entry.optimizers
        self.state = entry.state
        """Objects that live as long as the pass is on the model, also when others come and go."""
        self.counts = entry.counts
        """Things the pass counts while it runs; shown by ``handle.report()``."""
        self._session = session
        self._entry = entry

    def module(self, path: str) -> nn.Module:
        """The module at ``path`` ("" is the model itself)."""
        return self.model.get_submodule(path)

    def wrap(self, target: Any, method: str, around: Callable[..., Any]) -> None:
        """Make ``target.method(...)`` run ``around(target, inner, *args, **kwargs)``.

        ``inner`` is the bound method as it was. ``target`` may be any object with a class of its own, a module or an
        optimizer; only this object changes. ``around`` must use the ``target`` it is given, not one it closed over:
        a deep copy of the model shares the subclass.
        """
        if isinstance(target, torch.jit.ScriptModule):
            raise InputError(
                f"{self._entry.pass_.name} cannot change a scripted module ({type(target).__name__}): apply memopt "
                "before torch.jit.script"
            )
        if method in vars(target):
            raise InputError(
                f"{self._entry.pass_.name} cannot wrap {type(target).__name__}.{method}: another library replaced it "
                "on the instance. Apply memopt first, or remove that wrapper (accelerate: "
                "accelerate.hooks.remove_hook_from_module)."
            )
        base = type(target)
        inner = getattr(base, method)

        @functools.wraps(inner)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(self, functools.partial(inner, self), *args, **kwargs)

        names: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        make: Any = type(base)
        if not hasattr(base, _MARK):
            names["__reduce_ex__"] = _reduce(base)
        subclass = make(base.__name__, (base,), {**names, method: wrapped, _MARK: base})
        object.__setattr__(target, "__class__", subclass)  # not by a __setattr__ of the model's own
        self._session.classes.append((target, subclass))

        def restore() -> None:
            object.__setattr__(target, "__class__", base)
            self._session.classes.pop()

        self._session.journal.append(restore)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set a plain attribute, remembering the old one (or that there was none on the instance)."""
        if isinstance(target, nn.Module):
            registered = (target._parameters, target._buffers, target._modules)
            if any(name in held for held in registered) or isinstance(value, (nn.Module, nn.Parameter)):
                raise MemoptError(
                    f"{self._entry.pass_.name}: Edit.set is for plain attributes; {name!r} of a "
                    f"{type(target).__name__} is a parameter, buffer or submodule. Change what forward does, by "
                    "Edit.wrap."
                )
        had, old = name in vars(target), vars(target).get(name)
        setattr(target, name, value)
        self._session.journal.append(lambda: setattr(target, name, old) if had else delattr(target, name))

    def hook(self, register: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register a torch hook: ``edit.hook(module.register_forward_hook, fn, with_kwargs=True)``."""
        self._session.journal.append(register(*args, **kwargs).remove)

    def at_phase_end(self, phase: str, callback: Callable[[], None]) -> None:
        """Call back whenever the loop leaves ``handle.phase(phase)``."""
        callbacks = self._session.phases.setdefault(phase, [])
        callbacks.append(callback)
        self._session.journal.append(lambda: callbacks.remove(callback))

    def note(self, text: str) -> None:
        """Say something about what was found or done; shown by ``handle.report()``."""
        self._entry.notes.append(text)


def _reduce(base: Any) -> Callable[..., Any]:
    """``__reduce_ex__`` for a subclass made on the spot: it can be copied, but pickle would not find it by its name."""

    def reduce(self: Any, protocol: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") != "copy":
            raise InputError(
                f"this {base.__name__} has passes of memopt and cannot be pickled, which torch.save of it does. Save "
                "its state_dict(), or undo the passes first."
            )
        return base.__reduce_ex__(self, protocol)

    return reduce


class _Session:
    """All that is active on one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries: list[_Entry] = []
        self.journal: list[Callable[[], None]] = []
        self.classes: list[tuple[Any, type]] = []
        self.phases: dict[str, list[Callable[[], None]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Session:
        # A copy of the model shares the dynamic subclasses but not the journal: `find` refuses to build upon it.
        return _Session(cast(nn.Module, None))

    def __reduce__(self) -> Any:
        return _Session, (None,)

    @staticmethod
    def find(model: nn.Module) -> _Session:
        """The session of ``model``, or a new one that is not attached yet."""
        session: _Session | None = model.__dict__.get(_SESSION)
        if session is None:
            session = _Session(model)
        elif session.model is not model:
            raise MemoptError(
                "this model is a copy of one with passes applied; it works, but passes can be neither added nor "
                "removed. Undo the passes on the original, copy it, and apply them to each."
            )
        return session

    def become(self, entries: list[_Entry]) -> None:
        """Make ``entries`` the passes on the model; on any exception it is left with those it had."""
        before = self.entries
        self._unwind()
        try:
            self._apply(entries, known=before)
        except BaseException as error:
            self._unwind()
            try:
                self._apply(before, known=before)
            except MemoptError as again:  # the model was changed since they were applied
                self._unwind()
                lost = ", ".join(str(entry.pass_) for entry in before)
                raise MemoptError(
                    f"{error} The passes that were on the model ({lost}) no longer fit it either, since it was changed "
                    f"after they were applied: {again} The model is now without passes."
                ) from error
            raise

    def _unwind(self) -> None:
        for target, subclass in {id(t): (t, c) for t, c in self.classes}.values():
            if type(target) is not subclass:
                raise MemoptError(
                    f"cannot take the passes off: the class of a {subclass.__name__} was changed after memopt.apply "
                    f"(now {type(target).__module__}.{type(target).__qualname__}). Undo that change first; "
                    "nothing was touched."
                )
        while self.journal:
            self.journal.pop()()
        self.model.__dict__.pop(_SESSION, None)
        self.entries = []

    def _apply(self, entries: list[_Entry], known: list[_Entry]) -> None:
        for entry in entries:
            entry.notes.clear()
            entry.claims = entry.pass_.plan(self.model, Context(optimizers=entry.optimizers))
            if not entry.claims:
                found = f"found nothing to do. It needs {entry.pass_.wanted()}; {_describe(self.model)}"
                if entry.missing == "raise" and entry not in known:  # those were applied; the model was changed since
                    raise NothingToDo(f"{entry.pass_.name}: {found}. Leave the pass out, or say missing='skip'.")
                entry.notes.append(f"skipped: {found}")
        _check_conflicts(entries)
        self._check_foreign_roots(entries)
        if entries:
            self.model.__dict__[_SESSION] = self
        self.entries = entries
        for entry in sorted(entries, key=lambda e: STAGES.index(e.pass_.stage)):
            if entry.claims:
                entry.pass_.apply(entry.claims, Edit(self, entry))

    def _check_foreign_roots(self, entries: list[_Entry]) -> None:
        """Refuse to touch a module that passes applied to another root hold."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for entry in entries:
            for claim in entry.claims:
                module = modules.get(claim.path) if claim.aspect not in ("optimizer", "loop") else None
                if module is not None and _MARK in vars(type(module)):
                    raise PassConflict(
                        f"{entry.pass_.name} wants the {claim}, but passes were applied to that module on its own, or "
                        "through another model that holds it. Undo those first, or apply all passes in one call."
                    )


def _check_conflicts(entries: list[_Entry]) -> None:
    for i, first in enumerate(entries):
        for second in entries[i + 1 :]:
            if first.pass_ == second.pass_:
                raise AlreadyApplied(f"{second.pass_} is already applied to this model. Undo its handle first.")
            if conflict := between(first.pass_, first.claims, second.pass_, second.claims):
                raise PassConflict(str(conflict))


def _describe(model: nn.Module) -> str:
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    shown = ", ".join(children[:6]) + (", ..." if len(children) > 6 else "")
    return f"{type(model).__name__} has {shown or 'no submodules'}"


class Handle:
    """What ``apply`` returns: report on its passes, take them off, tell them what the loop does. A context manager."""

    def __init__(self, session: _Session, entries: list[_Entry]) -> None:
        self._session = session
        self._entries = entries

    @property
    def model(self) -> nn.Module:
        """The model, the same object that was given to ``apply``."""
        return self._session.model

    @property
    def active(self) -> bool:
        """False after ``undo``."""
        return any(entry in self._session.entries for entry in self._entries)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes this handle put on the model."""
        return tuple(entry.pass_ for entry in self._entries)

    def undo(self) -> None:
        """Take this handle's passes off; those of other handles stay. The second call does nothing."""
        if self.active:
            rest = [entry for entry in self._session.entries if entry not in self._entries]
            self._session.become(rest)

    def report(self, inputs: Any = None, **how: Any) -> Report:
        """What each pass found and did so far; with inputs, also what it saves.

        Args:
            inputs: what the model is called with, as for ``memopt.profile``. Then the plain model is profiled on fake
                tensors, and the model with one pass more after another.
            how: further arguments of ``memopt.profile``: ``loss``, ``train``, ``optimizer``, ``device``.
        """
        savings: dict[int, Saving] = {}
        working = [e for e in self._entries if e.claims]
        if inputs is not None and working:
            from memopt.memory.profiler import savings_of  # above this file in the layers

            others = [e.pass_ for e in self._session.entries if e not in self._entries and e.claims]
            found = savings_of(self.model, others, [e.pass_ for e in working], inputs, **how)
            savings = {id(e): saving for e, saving in zip(working, found, strict=True)}
        return Report(
            tuple(
                ReportRow(
                    name=e.pass_.name,
                    exact=e.pass_.exact,
                    exactness=exactness(e.pass_),
                    config=str(e.pass_),
                    claims=tuple(e.claims),
                    notes=tuple(e.notes),
                    counts=dict(e.counts),
                    saving=savings.get(id(e)),
                )
                for e in self._entries
            )
        )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that fp16 needs in the loop (scale, step, update), or None."""
        return next((e.state["scaler"] for e in self._session.entries if "scaler" in e.state), None)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a part of the loop that is no training step, one of ``PHASES``; passes act at its end."""
        if name not in PHASES:
            raise InputError(f"unknown phase {name!r}: a loop can name {', '.join(PHASES)}")
        try:
            yield
        finally:
            for callback in self._session.phases.get(name, ()):
                callback()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


@dataclass(frozen=True)
class Active:
    """What is applied to a model."""

    passes: tuple[Pass, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    """Those that the passes were given, each once."""


def active_passes(model: nn.Module) -> Active:
    """What is applied to a model at the moment, in the order it was asked for."""
    session: _Session | None = model.__dict__.get(_SESSION)
    entries = session.entries if session is not None else []
    optimizers = {id(o): o for entry in entries for o in entry.optimizers}
    return Active(tuple(entry.pass_ for entry in entries), tuple(optimizers.values()))


@contextlib.contextmanager
def without_passes(model: nn.Module) -> Iterator[Active]:
    """The model as it is without its passes, which are applied again afterwards."""
    active = active_passes(model)
    session = _Session.find(model)
    entries = session.entries
    if entries:
        session.become([])
    try:
        yield active
    finally:
        if entries:
            session.become(entries)


def _planned(model: nn.Module, passes: Any, optimizer: Any, planning: dict[str, Any]) -> Any:
    """A list of passes from any of the forms that ``apply`` takes."""
    from memopt.planning.plans import Plan  # above this file in the layers

    if passes == "auto":
        from memopt.planning import plan

        if missing := [name for name in ("inputs", "budget") if name not in planning]:
            raise InputError(f"passes='auto' needs {' and '.join(missing)}, as memopt.plan does")
        one = next(iter(optimizer), None) if isinstance(optimizer, Sequence) else optimizer
        passes = plan(model, planning.pop("inputs"), planning.pop("budget"), optimizer=one, **planning)
    elif planning:
        raise InputError(f"{', '.join(planning)}: only with passes='auto'")
    if isinstance(passes, Plan):
        passes.check(model)
        return passes.passes
    return [passes] if isinstance(passes, (str, Mapping, Pass)) else passes


def apply(
    model: nn.Module,
    passes: Sequence[Any] | Plan | Literal["auto"],
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    missing: Literal["raise", "skip"] = "raise",
    **planning: Any,
) -> Handle:
    """Apply passes to a model in place.

    Args:
        model: any module; it stays the same object, with the same keys.
        passes: objects (``Checkpoint()``), names (``"checkpoint"``) or tables (``{"amp": {"dtype": "bf16"}}``), in any
            order; or a plan of ``memopt.plan``; or ``"auto"``, which makes one. A model that already has passes keeps
            them.
        optimizer: the optimizer or optimizers of the training loop, for those of ``passes`` that need them.
        missing: what to do with a pass that finds nothing to do: ``"raise"``, or ``"skip"`` it and report that.
        planning: with ``"auto"``, the arguments of ``memopt.plan``: ``inputs`` and ``budget``, and others of it.

    Returns:
        A handle with ``undo()``, ``report()``, ``phase(name)`` and ``scaler``; also a context manager.

    Raises:
        UnknownPass, InputError: a name or an option that does not exist.
        NothingToDo: a pass found nothing to change.
        AlreadyApplied, PassConflict: two passes want the same thing.
        In every case, and when a pass fails half way, the model is as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"apply needs a torch.nn.Module, not a {type(model).__name__}")
    chosen: Any = _planned(model, passes, optimizer, planning)
    if chosen is None or isinstance(chosen, type):
        raise InputError(f"passes must be a list of objects, names or tables, not {chosen!r}")
    if missing not in ("raise", "skip"):
        raise InputError(f"missing={missing!r}: say 'raise' or 'skip'")
    given = () if optimizer is None else tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for one in given:
        if not isinstance(one, torch.optim.Optimizer):
            raise InputError(f"optimizer must be a torch.optim.Optimizer, not a {type(one).__name__}")
    given = tuple({id(one): one for one in given}.values())
    session = _Session.find(model)
    entries = [_Entry(pass_, missing, given) for like in chosen for pass_ in resolve(like)]
    if entries:
        session.become(session.entries + entries)
    return Handle(session, entries)
