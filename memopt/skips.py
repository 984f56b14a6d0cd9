"""Tensors that wait while a model goes deep and comes back: finding them, and moving them out meanwhile.

*Finding.* What waits is known only when a model runs. The first forward is watched (:class:`Learner`): the results of
modules, each use that their caller makes of them (handing one to a module, or to a function of torch), and how many
leaf modules are called between two uses. A result that waits long is a *skip connection*; a plan says after which use.

*Moving.* In later forwards such a result is handed to the caller as a :class:`Skip`, which stands for it
(`deferred/standin.py`): the Python structure that keeps it keeps no memory. After its last early use, once nobody else
holds the tensor or a view of its memory, it moves out, and autograd lets go of it, too (`tape.py`). The next use brings
it back; those that the plan expects then set out. A skip gives its tensor to whoever asks, from wherever it is: what
was learned decides when copies are made.

*Gradients.* The tensor that comes back must belong to the graph of the one that left. A node that left nothing but the
edge (:class:`_Leave`) is made when it moves out, one for its return (:class:`_Return`) when it is used. Both pass the
gradient on as it is. All earlier uses are older than these nodes, since nobody has the tensor any more, so backward
adds up its gradients in the order that it would without them.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

from memopt.deferred import HOOKING, StandIn
from memopt.errors import MemoptError
from memopt.saved import hooks_allowed, is_held_for_now
from memopt.tape import Away, Tape, tape_in_force
from memopt.tensors import holders_of, is_memory

_METADATA = """
size dim ndim numel nelement stride storage_offset is_contiguous is_floating_point is_complex is_signed element_size
itemsize nbytes layout names ndimension
"""
_ASKING = frozenset(_METADATA.split())
"""Attributes and methods that look at a tensor without its values; a skip answers them while its tensor is away."""
_LOOKING = {"__get__", "__len__", "__repr__", *_ASKING}
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
                for position, tensor in enumerate(_leaves(output)):
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


class Skip(StandIn):
    """Stands for a tensor that may be away."""

    def __init__(self, tensor: Tensor, site: Site, run: Run) -> None:
        self.device = tensor.device
        self.site, self.run = site, run
        self.uses = self.inside = 0
        self.pinned = False
        """Changed in place, or hooked: stays from then on."""
        self.here: Tensor | None = tensor
        self.away: Away | None = None
        self._left: Tensor = tensor
        """While it is away: the edge of its graph, or an empty tensor, that looks like it."""

    def make(self, why: str) -> Tensor:
        self.run.tick()
        with self.run.lock:
            tensor = self._get()
            self.uses += 1
            if self.uses in self.run.plan.parks[self.site] and not any(skip is self for skip in self.run.due):
                self.run.due.append(self)
            return tensor

    def mark(self, why: str) -> Tensor:
        if self.away is not None and self.requires_grad and HOOKING.fullmatch(why):
            raise MemoptError(
                f"{why} comes too late for a skip connection (of {self.site.path}) that was away since it was made: "
                "leave out the pass offload_skips"
            )
        self.pinned = True
        return self.make(why)

    def stands_for(self, result: Any) -> bool:
        return result is self.here

    def park(self) -> bool:
        """Move the tensor out, unless somebody else has it or its memory; whether that needs no further try."""
        tensor = self.here
        if tensor is None or self.pinned:
            return True
        tape = self.run.tape
        # This name, the attributes and the argument; of its memory also what autograd would let go of, and a base that
        # only this view of it keeps.
        mine = sys.getrefcount(tensor) <= 3 + (self._left is tensor) and tensor._use_count() == 1  # type: ignore[attr-defined]
        own = tensor._base is not None and _holders_of_base(tensor) == _holders_of_sole_base()
        if self.inside or not mine or holders_of(tensor) > 1 + own + tape.keeps(tensor):
            return False
        with torch.no_grad():
            self.away = tape.park(tensor)
        if self.away is not None:
            self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()
            with torch.inference_mode(False), torch.enable_grad():
                self._left = _Leave.apply(tensor) if tensor.requires_grad else _empty(tensor)
            self.here = None
        return True

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.here is None and self.away is not None:
            self.away.parked.fetch()

    def _get(self) -> Tensor:
        """The tensor, from wherever it is."""
        if self.here is None:
            assert self.away is not None
            with torch.no_grad(), torch.inference_mode(False):
                flat = self.away.parked.get()
                # A view might not be changed in place; its data may.
                tensor = flat.as_strided(self._size, self._stride, self._offset - self.away.start).data
            if self._left.requires_grad:
                with torch.inference_mode(False), torch.enable_grad():
                    tensor = _Return.apply(self._left, [tensor])
            self.run.tape.adopt(tensor, self.away)
            self.here = self._left = tensor
            self.run.returned(self)
        elif self.away is not None:
            self.away.parked.share(self.here)
        return self.here

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._look.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._look.dtype

    @property
    def requires_grad(self) -> bool:
        return self._look.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.mark("requires_grad").requires_grad = value

    @property
    def _look(self) -> Tensor:
        return self._left if self.here is None else self.here

    def __getattr__(self, name: str) -> Any:
        if name in _ASKING:
            # Of the same strides, which the edge of a graph has not.
            return getattr(_empty(self._look, self._stride) if self.here is None else self.here, name)
        if name in ("is_cuda", "is_cpu"):
            return self.device.type == name[3:]
        return super().__getattr__(name)


def _holders_of_base(view: Tensor) -> tuple[int, int]:
    """References to a view's base, Python's and C++'s."""
    base: Any = view._base
    return sys.getrefcount(base), base._use_count()


@functools.cache
def _holders_of_sole_base() -> tuple[int, int]:
    """Those to a base that only a view keeps; they differ between versions of torch."""
    with torch.no_grad():
        return _holders_of_base(torch.empty(2, device="cpu").view(1, 2))


def _empty(like: Tensor, stride: tuple[int, ...] | None = None) -> Tensor:
    """A tensor without memory that looks like another."""
    return torch.empty_strided(like.shape, stride or like.stride(), dtype=like.dtype, device="meta")


class _Leave(torch.autograd.Function):
    """The graph's edge to a tensor without its memory."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # no gradient is not the same as zeros
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Return(torch.autograd.Function):
    """A tensor at the end of such an edge."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, box: list[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return box.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Run:
    """One forward by a plan.

    Args:
        tape: moves the skips, unless another one gets what autograd saves: then that does.
        least: bytes; smaller tensors stay.
        prefetch: how many skips set out before they are used.
    """

    def __init__(self, plan: Plan, tape: Tape, least: int, prefetch: int) -> None:
        self.plan, self.least, self.prefetch = plan, least, prefetch
        self.lock = threading.RLock()
        self.due: list[Skip] = []
        """Skips after their last early use."""
        self.frames: list[list[Skip]] = []
        """What each running module was given."""
        self._tape = tape
        self._calls: Counter[str] = Counter()
        self._skips: dict[Site, weakref.ref[Skip]] = {}
        self._next = 0

    def __enter__(self) -> Run:
        _running.runs.append(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _running.runs.pop()
        self.due.clear()  # which would keep those that never left, and these the run
        self.frames.clear()

    @property
    def tape(self) -> Tape:
        """What moves the skips."""
        return tape_in_force() or self._tape

    def tick(self) -> None:
        """Move out what is due."""
        if self.due:
            with self.lock:
                self.due = [skip for skip in self.due if not skip.park()]

    def made(self, path: str, output: Any, given: list[Skip]) -> Any:
        """A module's result, with skips in place of tensors that the plan names, or that are those it was given."""
        call, self._calls[path] = self._calls[path], self._calls[path] + 1
        skips = {id(skip.here): skip for skip in given if skip.here is not None}
        for position, leaf in enumerate(_leaves(output)):
            site = Site(path, call, position)
            if site in self.plan.parks and id(leaf) not in skips and can_wait(leaf, self.least):
                skip = skips[id(leaf)] = Skip(leaf, site, self)
                self._skips[site] = weakref.ref(skip)
                if 0 in self.plan.parks[site]:
                    self.due.append(skip)
        return _exchanged(output, skips) if skips else None

    def returned(self, skip: Skip) -> None:
        """Have the next ones set out."""
        returns = self.plan.returns
        if skip.site in returns[self._next :]:
            self._next = returns.index(skip.site, self._next) + 1
        for site in returns[self._next : self._next + self.prefetch]:
            ref = self._skips.get(site)
            other = ref() if ref is not None else None
            if other is not None:
                other.fetch()


class _Running(threading.local):
    def __init__(self) -> None:
        self.runs: list[Run] = []


_running = _Running()


class Hooks:
    """The hooks on a module that makes skips or is given some; a copy of the module has a copy of them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def put(self, module: nn.Module) -> list[Any]:
        """Register them."""
        return [
            module.register_forward_pre_hook(self.begin, with_kwargs=True),
            module.register_forward_hook(self.end, always_call=True),
        ]

    @staticmethod
    def on(module: nn.Module) -> bool:
        """Whether a module has some."""
        return any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in module._forward_hooks.values())

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give the module tensors."""
        if torch.compiler.is_compiling() or not _running.runs:
            return None
        run = _running.runs[-1]
        run.tick()
        if not hooks_allowed():
            return None
        given = {id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Skip)}
        run.frames.append(list(given.values()))
        if not given:
            return None
        made = {}
        for key, skip in given.items():
            made[key] = skip.make("a module")
            skip.inside += 1
        args = tuple(made.get(id(value), value) for value in args)
        return args, {name: made.get(id(value), value) for name, value in kwargs.items()}

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take skips of its results."""
        if torch.compiler.is_compiling() or not _running.runs:
            return None
        run = _running.runs[-1]
        given = run.frames.pop() if run.frames else []
        for skip in given:
            skip.inside -= 1
        hooks = (
            module._backward_hooks,
            module._backward_pre_hooks,
            nn_module._global_backward_hooks,
            nn_module._global_backward_pre_hooks,
        )
        if any(hooks) or not hooks_allowed():  # the former want tensors
            return None
        return run.made(self.path, output, given)


def _leaves(output: Any) -> Iterator[Any]:
    """What is in nested tuples, lists and dicts, in order."""
    if isinstance(output, (tuple, list)):
        for item in output:
            yield from _leaves(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from _leaves(item)
    else:
        yield output


def _exchanged(output: Any, skips: dict[int, Skip]) -> Any:
    """The same with skips for tensors; lists and dicts, which a module may keep itself, stay the same objects."""
    if isinstance(output, list):
        output[:] = [_exchanged(item, skips) for item in output]
    elif isinstance(output, dict):
        output.update({key: _exchanged(item, skips) for key, item in output.items()})
    elif isinstance(output, tuple):
        items = [_exchanged(item, skips) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    else:
        return skips.get(id(output), output)
    return output
