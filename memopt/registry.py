"""What a pass is, and how one is found by its name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from memopt.config import build
from memopt.errors import InputError, MemoptError, UnknownPass

if TYPE_CHECKING:
    from memopt.core import Edit

Stage = Literal["rewrite", "hook", "wrap"]
Aspect = Literal["graph", "weights", "activations", "forward", "optimizer", "loop"]

STAGES: tuple[Stage, ...] = ("rewrite", "hook", "wrap")
ENTRY_POINTS = "memopt.passes"
_REGISTRY: dict[str, type[Pass]] = {}


@dataclass(frozen=True)
class Claim:
    """What a pass will change: one aspect of one place.

    ``path`` is a module path as in ``named_modules()`` ("" is the whole model); for the aspects ``optimizer`` and
    ``loop`` it is a dotted name in their own space, such as ``0.zero_grad`` or ``sampling``.
    """

    path: str
    aspect: Aspect
    part: str = ""
    """Which operations there, where a pass changes only some; claims of different parts do not overlap."""

    def overlaps(self, other: Claim) -> bool:
        """True where both speak of the same aspect, and of the same place or one inside the other."""
        if self.part != other.part and self.part and other.part:
            return False
        short, long = sorted((self.path, other.path), key=len)
        return self.aspect == other.aspect and (short in ("", long) or long.startswith(f"{short}."))

    def __str__(self) -> str:
        return f"{self.part or self.aspect} of {self.path or 'the whole model'}"


def matching_modules(model: nn.Module, pattern: str | Sequence[str]) -> list[str]:
    """Paths of the modules that match the glob, or one of several, outermost ones only."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called itself
            continue
        matches = name and any(fnmatch.fnmatchcase(name, one) for one in patterns)
        if matches and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return found


@dataclass(frozen=True)
class Context:
    """What a plan may look at besides the model."""

    optimizers: tuple[torch.optim.Optimizer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One technique. A subclass is a frozen dataclass whose fields are its options, each with a docstring."""

    name: ClassVar[str]
    """How the CLI, tables and reports call it."""
    stage: ClassVar[Stage]
    """When it is applied, whatever order the user lists: rewrite, then hook, then wrap."""
    exact: ClassVar[bool]
    """True: loss and every gradient stay as they were. False: ``changes`` says what does not."""
    rounding: ClassVar[bool] = False
    """For exact passes: equal to rounding rather than bit by bit, because the same is computed in another way."""
    modes: ClassVar[frozenset[str]] = frozenset({"train", "infer"})
    needs: ClassVar[str] = "any model"
    """What it must find; the error for an empty plan and ``memopt passes`` show it."""
    changes: ClassVar[str] = ""
    """For passes that are not exact: what changes, and the tolerance it is tested to."""
    not_by_default: ClassVar[str] = ""
    """Why ``memopt ablate`` takes it only by name, if it does, although it is exact."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name := cls.__dict__.get("name"):
            known = _REGISTRY.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise MemoptError(f"pass name {name!r} is taken by {known.__module__}.{known.__qualname__}")
            _REGISTRY[name] = cls

    def _check_at_least(self, **options: int) -> None:
        """Raise an InputError where an option is no whole number of at least so much."""
        for option, least in options.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{self.name}: {option} must be at least {least}, not {value!r}")

    def wanted(self) -> str:
        """What this pass, with its options, needs to find; for the error where it finds nothing."""
        return self.needs

    @abstractmethod
    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        """What this pass would change. Looks at the untouched model and changes nothing; empty means nothing to do."""

    @abstractmethod
    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        """Change the model as claimed, through ``edit`` alone."""

    def __str__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})"


def exactness(pass_: Pass | type[Pass]) -> str:
    """How equal results with a pass are to those without, in words."""
    if not pass_.exact:
        return "not exact"
    return "exact to rounding" if pass_.rounding else "exact"


def available_passes() -> dict[str, type[Pass]]:
    """Every pass by name: memopt's own, those defined in this process, and those of installed packages."""
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in _REGISTRY:
            found = point.load()
            if not (isinstance(found, type) and issubclass(found, Pass) and getattr(found, "name", None) == point.name):
                raise MemoptError(
                    f"entry point {point.name!r} of group {ENTRY_POINTS} ({point.value}) must name a memopt.Pass "
                    f"subclass whose `name` is {point.name!r}"
                )
    return dict(sorted(_REGISTRY.items()))


def resolve(like: Any) -> list[Pass]:
    """Passes from an object, a name, or a table ``{name: {option: value}}`` (one table may hold several)."""
    if isinstance(like, Pass):
        return [like]
    if isinstance(like, str):
        like = {like: {}}
    if not isinstance(like, Mapping):
        raise InputError(f"a pass is given as an object, a name or a table of options, not as {like!r}")
    # Installed packages are asked only for a name that is not known yet: a broken one must not hurt the others.
    known = dict(_REGISTRY) if all(name in _REGISTRY for name in like) else available_passes()
    found = []
    for name, options in like.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UnknownPass(f"unknown pass {name!r}.{hint} There are: {', '.join(known)}.")
        found.append(build(known[name], options, what=f"pass {name!r}"))
    return found
