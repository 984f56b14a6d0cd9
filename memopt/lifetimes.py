"""Which of a model's tensors wait long between two uses: its skip connections, found by watching a forward.

A tensor's life is seen in the results of modules, and in each use that their caller makes of them: handing one to a
module, or to a function of torch. What happens inside a module that was given it is that module's business.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memopt.deferred import HOOKING
from memopt.saved import hooks_allowed, is_held_for_now
from memopt.tensors import is_memory

_METADATA = """
size dim ndim numel nelement stride storage_offset is_contiguous is_floating_point is_complex is_signed element_size
itemsize nbytes layout names ndimension
"""
ASKING = frozenset(_METADATA.split())
"""Attributes and methods that look at a tensor without its values; a skip answers them while its tensor is away."""
_LOOKING = {"__get__", "__len__", "__repr__", *ASKING}
FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules of torch's that compute in another way where there are hooks or function modes."""


class Site(NamedTuple):
    """Where a tensor comes from: which tensor in the result of which call of a module."""

    path: str
    call: int
    position: int


@dataclass(frozen=True)
class Plan:
    """What waits in a forward."""

    parks: dict[Site, frozenset[int]] = field(default_factory=dict)
    """After how many uses each skip moves out."""
    returns: tuple[Site, ...] = ()
    """The skips in the order of their returns."""
    modules: frozenset[str] = frozenset()
    """Paths of the modules that make skips, are given some, or begin when one has been used early for the last time."""


class _Seen:
    """A module's result, as the learner sees it."""

    def __init__(self, site: Site, tensor: Tensor, clock: int, entered: int) -> None:
        self.site, self.ref = site, weakref.ref(tensor)
        self.uses: list[list[int]] = [[clock, clock, entered]]  # begin, end, modules entered by then; first its birth
        self.inside = 0
        self.hooked = False
        self.consumers: set[str] = set()


class Learner(TorchFunctionMode):
    """Watches one forward of a model.

    Args:
        least: bytes; smaller tensors are not looked at.
        waits: calls of leaf modules between two uses that are long.
    """

    def __init__(self, model: nn.Module, least: int, waits: int) -> None:
        super().__init__()
        self._model, self._least, self._waits = model, least, waits
        self._thread = threading.get_ident()
        self._clock = 0
        self._entered: list[str] = []
        self._seen: dict[int, _Seen] = {}
        self._all: list[_Seen] = []
        self._calls: Counter[str] = Counter()
        self._frames: list[list[_Seen]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        try:
            for path, module in hookable(self._model):
                self._handles.append(module.register_forward_pre_hook(self._begin(path), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._end(path), always_call=True))
            return super().__enter__()
        except BaseException:
            self._remove()
            raise

    def __exit__(self, *exc: Any) -> Any:
        self._remove()
        return super().__exit__(*exc)

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _here(self) -> bool:
        return threading.get_ident() == self._thread and hooks_allowed()

    def _begin(self, path: str) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._here():
                return
            self._clock += not module._modules
            given = [seen for seen in map(self._known, (*args, *kwargs.values())) if seen is not None]
            for seen in given:
                if not seen.inside:
                    seen.uses.append([self._clock, self._clock, 0])
                    seen.consumers.add(path)
                seen.inside += 1
            self._entered.append(path)
            self._frames.append(given)

        return begin

    def _end(self, path: str) -> Callable[..., None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not self._here():
                return
            call, self._calls[path] = self._calls[path], self._calls[path] + 1
            with torch._C.DisableTorchFunction():  # our own questions are no uses
                for position, tensor in enumerate(leaves_of(output)):
                    known = self._known(tensor)
                    if (known is None or not known.inside) and can_wait(tensor, self._least):
                        seen = _Seen(Site(path, call, position), tensor, self._clock, len(self._entered))
                        if known is not None and known.site[:2] == seen.site[:2]:
                            continue  # twice in one result
                        self._seen[id(tensor)] = seen
                        self._all.append(seen)
            for seen in self._frames.pop() if self._frames else ():
                seen.inside -= 1
                seen.uses[-1][1:] = self._clock, len(self._entered)

        return end

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _LOOKING:
            for value in (*args, *kwargs.values()):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    seen = self._known(item)
                    if seen is not None and not seen.inside:
                        seen.uses.append([self._clock, self._clock, len(self._entered)])
                        seen.hooked |= HOOKING.fullmatch(name) is not None
        return func(*args, **kwargs)

    def _known(self, value: Any) -> _Seen | None:
        seen = self._seen.get(id(value)) if isinstance(value, Tensor) else None
        return seen if seen is not None and seen.ref() is value else None

    def plan(self) -> Plan:
        """What was found, to be asked while the forward's result is still held.

        What somebody has hooked, or keeps beyond the forward, he may want to be an ancestor of the result.
        """
        parks: dict[Site, frozenset[int]] = {}
        returns: list[tuple[int, int, Site]] = []
        modules: set[str] = set()
        for seen in self._all:
            pairs = zip(seen.uses, seen.uses[1:], strict=False)
            long = [n for n, (use, later) in enumerate(pairs) if later[0] - use[1] >= self._waits]
            tensor = seen.ref()
            if not long or seen.hooked or (tensor is not None and not is_held_for_now(tensor)):
                continue
            parks[seen.site] = frozenset(long)
            returns += [(seen.uses[n + 1][0], len(returns), seen.site) for n in long]
            # Where the next module begins, nobody uses it any more.
            after = [self._entered[at] for at in (seen.uses[n][2] for n in long) if at < len(self._entered)]
            modules |= {seen.site.path, *seen.consumers, *after}
        return Plan(parks, tuple(site for *_, site in sorted(returns)), frozenset(modules))


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside a model that compute the same with hooks."""
    fast: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in fast):
            continue
        if isinstance(module, FAST):
            fast.append(path)
        elif path and not isinstance(module, torch.jit.ScriptModule):
            yield path, module


def can_wait(tensor: Any, least: int) -> bool:
    """Whether a value is a tensor of so many bytes that a skip may stand for."""
    if not isinstance(tensor, Tensor) or not is_memory(tensor):
        return False
    if type(tensor) is Tensor and vars(tensor):  # somebody has hung something on it
        return False
    if tensor.is_leaf and tensor.requires_grad:
        return False
    return tensor.untyped_storage().nbytes() >= least and tensor.numel() * tensor.itemsize >= least


def leaves_of(output: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and dicts, in order."""
    if isinstance(output, (tuple, list)):
        for item in output:
            yield from leaves_of(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from leaves_of(item)
    else:
        yield output
