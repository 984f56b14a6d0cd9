"""Components on demand: of a pipeline's parts, only those in use are on the device; the others wait in host memory.

A *part* is a module that a pipeline uses as a whole: a text encoder, a denoiser, a decoder. Its weights, parameters and
buffers, come and go together, before anybody computes with them: each module of a part gets a dynamic subclass (as in
`memopt.core`) whose call and public methods first bring the part in and hold it there until they return. So
``vae.decode``, ``generate`` or a call of a single submodule are entries like any other. A part that is held never
leaves; of the others those leave first that were used longest ago.

Weights move by their storages, by ``tensor.data = ...``: parameters stay the same objects, and what shares memory goes
on sharing it, also between parts. Nothing that changes while a part is used is kept about it: each move looks at
the weights as they are then (:meth:`Stage._groups`), takes what it does not know for new, and copies out only what was
written to since it came. Interrupted moves are therefore finished by the next.

A part says that it is on the device it runs on (``part.device``), also while it waits. That is what pipelines ask
before they place inputs; a diffusers pipeline needs nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from memopt.errors import AlreadyApplied, InputError, MemoptError
from memopt.memory.ledger import lives, moved, off_the_books
from memopt.tensors import PLAIN, storage_of, version_of
from memopt.transfer import Pool
from memopt.units import format_bytes, parse_bytes

_STAGED = "_memopt_staged"  # in the __dict__ of each module of a part, and in that of its dynamic subclass


@dataclass(frozen=True)
class StageReport:
    """What a stage did so far, sizes in bytes; ``print`` shows it."""

    bytes: dict[str, int]
    """Of each part's weights; what parts share counts for each."""
    loads: dict[str, int]
    """How often each part was brought in."""
    resident: tuple[str, ...]
    """The parts that are on the device now, the least recently used first."""
    resident_bytes: int
    """What they take; what parts share counts once."""
    peak_bytes: int
    """The most that they took."""
    moved_in: int
    moved_out: int
    """Copied back to the host because it was written to on the device."""

    def __str__(self) -> str:
        parts = [f"{name}: {format_bytes(size)}, loads: {self.loads[name]}" for name, size in self.bytes.items()]
        sizes = map(format_bytes, (self.resident_bytes, self.peak_bytes, self.moved_in, self.moved_out))
        total = "resident: {} ({}), at most {}; moved in: {}, out: {}"
        return "\n".join([*parts, total.format(", ".join(self.resident) or "none", *sizes)])


def stage(
    parts: Mapping[str, nn.Module] | Any,
    *,
    device: str | torch.device | None = None,
    budget: int | float | str | None = None,
) -> Stage:
    """Keep the parts of a pipeline in host memory and bring each to the device when it is used.

    Args:
        parts: modules by name; or a pipeline with a mapping of ``components``, such as a diffusers pipeline, whose
            modules are the parts.
        device: where parts run, and where the caller puts their inputs: ``"cpu"`` or a CUDA device. Default: the CUDA
            device that weights are on, else the current one, else the CPU.
        budget: bytes, or a text such as ``"8GiB"``, up to which parts stay on the device after their use; the least
            recently used leave first. By default only the part that was used last stays. Parts that are in use at the
            same time stay also beyond it.

    Returns:
        A handle with ``undo()``, ``report()`` and ``use(name)``; also a context manager that undoes at its end.

    Raises:
        InputError: there are no parts or no such device, or a part is no module, contains another, has weights that
            cannot be moved as plain memory, or alone exceeds the budget. Nothing was changed.
        AlreadyApplied: a part is staged already. Nothing was changed.
    """
    named = _modules_of(parts)
    handle = Stage(torch.device("cpu"), None if budget is None else parse_bytes(budget, "budget"))
    for name, module in named.items():
        _check(name, module, named)
        same = next((part for part in handle._parts.values() if part.module is module), None)
        handle._parts[name] = same or _Part(name, module, handle)
    handle.device = _device(device, [t for module in named.values() for _, t in _weights(module)])
    handle._begin()
    return handle


class Stage:
    """The parts of a pipeline that come to ``device`` on demand; made by :func:`stage`. A context manager."""

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self.device, self.budget = device, budget
        self._parts: dict[str, _Part] = {}
        self._resident: list[_Part] = []  # least recently used first
        self._homes: dict[int, _Home] = {}  # by each of its storages
        self._pool = Pool(pinned=64 << 30, spare=0)  # bytes, as many as a Mover pins
        self._lock = threading.RLock()
        self._classes: list[tuple[nn.Module, type, type]] = []
        self._origins: dict[tuple[_Part, str], torch.device] = {}
        self._peak = self._moved_in = self._moved_out = 0

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """Hold a part on the device in a ``with`` block, for code that reads its weights itself.

        Raises:
            InputError: there is no part of that name.
        """
        if name not in self._parts:
            raise InputError(f"there is no part {name!r}; the parts are {', '.join(self._parts)}")
        part = self._parts[name]
        with self._held(part) if self._classes else contextlib.nullcontext():
            yield part.module

    def report(self) -> StageReport:
        """The parts, how often each was brought in, and the bytes that moved and that are resident now."""
        with self._lock:
            groups, here = self._groups(), self._resident
            return StageReport(
                bytes={name: _bytes(groups, [part]) for name, part in self._parts.items()},
                loads={name: part.loads for name, part in self._parts.items()},
                resident=tuple(part.name for part in here),
                resident_bytes=_bytes(groups, here),
                peak_bytes=self._peak,
                moved_in=self._moved_in,
                moved_out=self._moved_out,
            )

    def undo(self) -> None:
        """Put every weight back on the device it came from, and leave the parts as they were. Twice is once.

        Raises:
            MemoptError: a part is in use, or something was put on top of it; nothing was touched.
        """
        with self._lock:
            if busy := [name for name, part in self._parts.items() if part.uses]:
                raise MemoptError(f"cannot undo the stage while its part {busy[0]!r} is in use")
            if changed := [made.__name__ for module, made, _ in self._classes if type(module) is not made]:
                raise MemoptError(
                    f"cannot undo the stage: the class of a {changed[0]} was changed after it, as passes do. Undo "
                    "these passes first; nothing was touched."
                )
            self._resident = []
            if self._classes:
                self._restore()
            while self._classes:
                module, _, base = self._classes.pop()
                object.__setattr__(module, "__class__", base)
                module.__dict__.pop(_STAGED, None)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        # Copied parts enter it as they are met; a profile's are on fake tensors of the CPU, wherever these were.
        weights = (tensor for part in self._parts.values() for _, tensor in _weights(part.module))
        fake = any(isinstance(memo.get(id(tensor)), FakeTensor) for tensor in weights)
        made = memo[id(self)] = Stage(torch.device("cpu") if fake else self.device, self.budget)
        return made

    def _begin(self) -> None:
        """Put all weights down on the host, and the subclasses on the modules."""
        groups = self._groups()
        made: dict[type, type] = {}
        owners: dict[nn.Module, list[_Part]] = {}
        for part in dict.fromkeys(self._parts.values()):
            if self.budget is not None and (size := _bytes(groups, [part])) > self.budget:
                raise InputError(
                    f"part {part.name!r} alone takes {size:,} bytes, more than the budget of {self.budget:,}: give a "
                    "larger one, or take this part off the stage and apply the pass block_swap to it"
                )
            for name, tensor in _weights(part.module):
                self._origins[part, name] = tensor.device
            for module in part.module.modules():
                owners.setdefault(module, []).append(part)
        try:
            for module, parts in owners.items():
                base = type(module)
                made[base] = made.get(base) or _staged_class(base)
                object.__setattr__(module, "__class__", made[base])
                self._classes.append((module, made[base], base))
                module.__dict__[_STAGED] = _Parts(parts)
            self._place([], groups)
        except BaseException:
            self.undo()
            raise
        self._moved_out = 0

    @contextlib.contextmanager
    def _held(self, part: _Part) -> Iterator[None]:
        """Have a part on the device."""
        with self._lock:
            if part not in self._resident:
                self._bring(part)
            part.uses += 1
        try:
            yield
        finally:
            with self._lock:
                part.uses -= 1
                self._resident.remove(part)
                self._resident.append(part)

    def _bring(self, part: _Part) -> None:
        groups = self._groups()
        staying = list(self._resident)
        for old in self._resident:
            if _bytes(groups, [*staying, part]) <= (self.budget or 0):
                break
            if not old.uses:
                staying.remove(old)
        self._resident = staying
        self._place([*staying, part], groups)
        self._resident.append(part)
        self._peak = max(self._peak, _bytes(groups, self._resident))
        part.loads += 1

    def _groups(self) -> list[_Group]:
        """All weights as they are now, by the memory that they share."""
        found: dict[_Home | int, _Group] = {}
        for part in dict.fromkeys(self._parts.values()):
            for name, tensor in _weights(part.module):
                _check_weight(part.name, name, tensor)
                home = self._homes.get(storage_of(tensor))
                group = found.setdefault(home or storage_of(tensor), _Group(home))
                group.tensors[id(tensor)] = tensor
                group.names[part] = name
        return list(found.values())

    def _place(self, wanted: Collection[_Part], groups: list[_Group]) -> None:
        """Have the weights of these parts on the device, and no others."""
        with torch.inference_mode(False), torch.no_grad():  # weights stay ordinary tensors whoever moves them
            self._synchronize()  # kernels on any stream may still read what leaves
            for group in groups:
                home, used = group.home, group.used_by(wanted)
                if home is None or (home.near is not None and not (used and home.seen)):
                    self._out(group)
            for group in groups:
                if not group.near and group.used_by(wanted):
                    self._in(group)
            self._synchronize()  # whatever stream uses them, they are there
        known = [(group.home, data) for group in groups if group.home for data in (group.home.host, group.home.near)]
        self._homes = {storage_of(data): home for home, data in known if data is not None}

    @off_the_books()
    def _out(self, group: _Group) -> None:
        home = group.home = group.home or self._home(group.bytes())
        if group.near and home.seen != group.versions():
            home.host.copy_(group.bytes())
            self._moved_out += group.nbytes
        group.become(home.host)
        home.near = None

    def _in(self, group: _Group) -> None:
        home = group.home
        assert home is not None
        near = home.host.new_empty(home.host.numel(), device=self.device)  # on the books: ledgers see when it came
        with off_the_books():
            near.copy_(home.host, non_blocking=True)
            self._homes[storage_of(near)] = home
            home.near = near
            group.become(near)
        home.seen = group.versions()
        kinds = {"parameters" if isinstance(tensor, nn.Parameter) else "buffers" for tensor in group.tensors.values()}
        moved(near, "device", max(kinds))
        self._moved_in += near.numel()

    @off_the_books()
    def _restore(self) -> None:
        """Put every weight on the device it came from, in memory of its own."""
        homes = [(group, group.home) for group in self._groups() if group.home is not None]
        origins = [next(filter(None, map(self._origins.get, g.names.items())), self.device) for g, _ in homes]
        with torch.inference_mode(False), torch.no_grad():
            self._synchronize()
            for (group, _), origin in zip(homes, origins, strict=True):  # first what leaves the device
                if group.near and origin != self.device:
                    self._out(group)
            for (group, home), origin in zip(homes, origins, strict=True):
                if not group.near:
                    group.become(home.host.to(origin, copy=True))
        self._homes.clear()

    def _home(self, data: Tensor) -> _Home:
        """Host memory for these bytes, pinned where that works."""
        if isinstance(data, FakeTensor):
            home = _Home(data.new_empty(data.numel(), device="cpu"), data)
        else:
            buffer = self._pool.take(data.numel())
            home = _Home(buffer.tensor, data)
            weakref.finalize(home, self._pool.give, buffer)  # copies are over: each move waits for the device
        lives(home.host, "cpu")
        self._homes[storage_of(home.host)] = self._homes[storage_of(data)] = home
        return home

    def _synchronize(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize(self.device)


@dataclass(eq=False)
class _Part:
    """A module that comes and goes as a whole."""

    name: str
    module: nn.Module
    stage: Stage
    uses: int = 0  # calls that hold it, of any thread
    loads: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Part:
        made = _Part(self.name, memo[id(self.module)], copy.deepcopy(self.stage, memo))
        made.stage._parts[self.name] = memo[id(self)] = made
        return made


class _Parts(tuple[_Part, ...]):
    """The parts that a module belongs to. A copy of it belongs to those that were copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parts:
        return _Parts(copy.deepcopy(part, memo) for part in self if id(part.module) in memo)


@dataclass(eq=False)
class _Home:
    """Where one storage of weights waits: flat bytes."""

    host: Tensor
    near: Tensor | None  # the copy on the device while it is there; at first what the weights had
    seen: list[tuple[int, int]] = field(default_factory=list)  # the group's versions when it came


@dataclass(eq=False)
class _Group:
    """Weights that share a storage, and by which name each part has one of them."""

    home: _Home | None
    tensors: dict[int, Tensor] = field(default_factory=dict)
    names: dict[_Part, str] = field(default_factory=dict)

    def used_by(self, parts: Collection[_Part]) -> bool:
        """Whether any of these parts has one of them."""
        return any(part in parts for part in self.names)

    @property
    def nbytes(self) -> int:
        """Of the storage."""
        return next(iter(self.tensors.values())).untyped_storage().nbytes()

    @property
    def near(self) -> bool:
        """Whether all of them are on the device; an interrupted move may have left some."""
        near = self.home.near if self.home is not None else None
        return near is not None and all(storage_of(t) == storage_of(near) for t in self.tensors.values())

    def bytes(self) -> Tensor:
        """The storage as flat bytes."""
        like = min(self.tensors.values(), key=lambda tensor: tensor.itemsize)
        return like.detach().as_strided((self.nbytes // like.itemsize,), (1,), 0).view(torch.uint8)

    def versions(self) -> list[tuple[int, int]]:
        """Which tensors they are, and how often each was written to."""
        return [(key, version_of(tensor)) for key, tensor in self.tensors.items()]

    def become(self, flat: Tensor) -> None:
        """Have these bytes as their memory."""
        for tensor in self.tensors.values():
            whole = flat[: flat.numel() // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
            tensor.data = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _bytes(groups: list[_Group], parts: Collection[_Part]) -> int:
    """What parts take together."""
    return sum(group.nbytes for group in groups if group.used_by(parts))


def _weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _staged_class(base: type) -> type:
    """A subclass whose call and public methods hold the part, and whose ``device`` is where it runs."""
    names: dict[str, Any] = {name: _held(getattr(base, name)) for name in dir(base) if _is_entry(base, name)}
    names |= {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")} | {_STAGED: True}
    device = inspect.getattr_static(base, "device", None)
    if isinstance(device, property):
        names["device"] = property(
            lambda self: self.__dict__[_STAGED][0].stage.device if self.__dict__.get(_STAGED) else device.__get__(self)
        )
    make: Any = type(base)
    made: type = make(base.__name__, (base,), names)
    return made


def _is_entry(base: type, name: str) -> bool:
    """Whether a method may compute: what any module has (``state_dict``, ``to``, ``train``) does not."""
    plain = isinstance(inspect.getattr_static(base, name), types.FunctionType)
    own = plain and not name.startswith("_") and not hasattr(nn.Module, name)
    return own or name in ("__call__", "forward")


def _held(inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = self.__dict__.get(_STAGED)
        if not parts or torch.compiler.is_compiling():  # compiled code is called by code that holds the part
            return inner(self, *args, **kwargs)
        part = next((part for part in parts if part.uses), parts[0])
        with part.stage._held(part):
            result = inner(self, *args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.grad_fn for t in tree_leaves(result)):
            raise InputError(
                f"part {part.name!r} of the stage was used with gradients (in a {type(self).__name__}), but its "
                "weights may have left the device when backward needs them. Call it under torch.no_grad(), or freeze "
                "it and detach its inputs; to train it, take it off the stage and apply the pass block_swap."
            )
        return result

    return method


def _modules_of(parts: Any) -> dict[str, nn.Module]:
    """The parts by name, of a mapping or of a pipeline's components."""
    given = parts if isinstance(parts, Mapping) else getattr(parts, "components", None)
    if not isinstance(given, Mapping):
        kind = type(parts).__name__
        raise InputError(f"stage needs a mapping of names to modules, or a pipeline with such components, not a {kind}")
    named = {name: module for name, module in given.items() if isinstance(module, nn.Module)}
    if wrong := [name for name in given if name not in named and given is parts]:
        raise InputError(f"part {wrong[0]!r} is a {type(given[wrong[0]]).__name__}, not a torch.nn.Module")
    if not named:
        raise InputError(f"stage needs at least one part; there is no module in this {type(parts).__name__}")
    return named


def _check(name: str, module: nn.Module, others: Mapping[str, nn.Module]) -> None:
    """Refuse a part whose modules or weights cannot be staged."""
    roots = {root: other for other, root in others.items() if root is not module}
    for path, inner in module.named_modules():
        where = f"part {name!r}" + (f" ({path})" if path else "")
        if inner in roots:
            raise InputError(f"part {name!r} contains part {roots[inner]!r} (as {path}): leave one of them out")
        if isinstance(inner, torch.jit.ScriptModule):
            raise InputError(f"{where} is a scripted module: stage it before torch.jit.script")
        if hasattr(type(inner), _STAGED):
            raise AlreadyApplied(f"{where} is staged already, or a copy of a staged part: undo that stage first")
        if "_hf_hook" in vars(inner):
            raise InputError(f"{where} is moved by accelerate: remove its hooks first (pipeline.remove_all_hooks())")
    for path, tensor in _weights(module):
        _check_weight(name, path, tensor)


def _check_weight(part: str, name: str, tensor: Tensor) -> None:
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda")
    if not plain or tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        made = " made in inference mode" if tensor.is_inference() else ""
        raise InputError(
            f"{name} of part {part!r}, a {type(tensor).__name__} on {tensor.device.type}{made}, cannot be moved as "
            "plain memory: leave this part out of the stage"
        )


def _device(device: str | torch.device | None, weights: list[Tensor]) -> torch.device:
    """The device where parts run, with its number."""
    if device is None:
        placed = next((tensor.device for tensor in weights if tensor.device.type == "cuda"), None)
        device = placed or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: parts run on 'cpu' or a CUDA device such as 'cuda:0'")
    if found.type == "cpu":
        return torch.device("cpu")
    fake = all(isinstance(tensor, FakeTensor) for tensor in weights)
    if not fake and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", found.index or (0 if fake or found.index == 0 else torch.cuda.current_device()))
