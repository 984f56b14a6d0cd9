"""Moving skip connections out while a model goes deep and comes back.

*Finding.* What waits is known only when a model runs, so its first forward is watched (`lifetimes.py`); a plan says
after which use a module's result waits long.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from memopt.deferred import HOOKING, StandIn
from memopt.errors import MemoptError
from memopt.lifetimes import ASKING, Plan, Site, can_wait, leaves_of
from memopt.saved import hooks_allowed, in_checkpoint
from memopt.tape import Away, Tape, tape_in_force
from memopt.tensors import holders_of


class Skip(StandIn):
    """Stands for a tensor that may be away."""

    moves = True

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
            with torch.inference_mode(False), torch.no_grad():  # in this order: the former turns gradients on
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
        if name in ASKING:
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
        for position, leaf in enumerate(leaves_of(output)):
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
        given = {}
        if hooks_allowed():
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
        if in_checkpoint():  # computes it again outside of this run, where nothing is away: others must see the same
            return None
        return run.made(self.path, output, given)


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
