"""Where weights live while they are away from the device, and how they come.

A home is a flat tensor that anybody may read and write: the memory that a parameter has on a CPU, pinned memory for a
CUDA device, or a part of a mapped file. A :class:`Weight` is a parameter that has its home as its data while it is away
and a copy on the device while it is there.

What was written to the copy is taken home. Autograd's count of writes tells of it, but not always: torch's fused
optimizers, those of other libraries and ``parameter.data`` go past it. So an optimizer's step counts as a write, and so
does a gradient's arrival where somebody else has a hook on the parameter, who may step it there.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.mapped import MappedFile
from memopt.memory.ledger import lives, moved, off_the_books
from memopt.tensors import holders_of, is_memory, storage_of, version_of
from memopt.transfer import Mover, Tier

ALIGNMENT = 64
"""Bytes: where a weight may begin in a file."""

Arrival = Callable[[], Tensor]
"""Waits for a copy that is under way, and gives it."""


def can_leave(parameter: Tensor) -> bool:
    """Whether a parameter is plain memory that can be put down elsewhere and made again."""
    if not is_memory(parameter) or parameter.is_inference() or parameter.device.type not in ("cpu", "cuda"):
        return False
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(parameter)
    return dense


class Home:
    """The memory that a parameter on the CPU has anyhow."""

    file: MappedFile | None = None
    """Of which it is a part."""

    def __init__(self, flat: Tensor, tier: Tier = "cpu") -> None:
        self.flat, self.tier = flat, tier

    def begin(self, device: torch.device, spare: Tensor | None) -> Arrival:
        """Begin to make a copy on a device, in memory that is to spare if there is some."""
        near = self._near(device) if spare is None else spare
        with torch.no_grad(), off_the_books():
            near.copy_(self.flat)
        return lambda: near

    def _near(self, device: torch.device) -> Tensor:
        return torch.empty(self.flat.numel(), dtype=self.flat.dtype, device=device)

    @property
    def in_place(self) -> bool:
        """Whether the tensor's memory is where it was: torch moves what is shared with other processes."""
        return True

    def wait(self) -> None:
        """Wait for copies from here that are under way: somebody may write here now."""

    def keep(self, near: Tensor) -> None:
        """Take over what a copy has become."""
        self.flat.copy_(near)

    def leave(self, device: torch.device) -> Tensor:
        """The values, flat, on a device and in memory of their own."""
        return self.flat if self.flat.device == device else self.flat.to(device)


class HostHome(Home):
    """Host memory that is not the device's, pinned if possible."""

    def __init__(self, data: Tensor, mover: Mover) -> None:
        self.buffer, self.mover = mover.pool.take(data.nbytes), mover
        weakref.finalize(self, mover.pool.give, self.buffer)
        self.buffer.wait()
        super().__init__(self.buffer.tensor.view(data.dtype))

    def begin(self, device: torch.device, spare: Tensor | None) -> Arrival:
        return self.mover.lanes(device).back(self.buffer, self.flat.dtype).arrive

    def wait(self) -> None:
        self.buffer.wait()

    def leave(self, device: torch.device) -> Tensor:
        self.wait()
        return self.flat.to(device, copy=True)


class FileHome(Home):
    """A part of a mapped file."""

    file: MappedFile

    def __init__(self, flat: Tensor, file: MappedFile, start: int, reader: Reader, mover: Mover) -> None:
        super().__init__(flat, "disk")
        self.file, self.start, self.reader, self.mover = file, start, reader, mover

    def begin(self, device: torch.device, spare: Tensor | None) -> Arrival:
        if self.file.written(self.start, self.flat.nbytes):
            return super().begin(device, spare)
        if device.type == "cpu":
            near = self._near(device) if spare is None else spare
            wait = self.reader.read(self.file, self.start, near)
            return lambda: (wait(), near)[1]
        buffer = self.mover.pool.take(self.flat.nbytes)
        buffer.wait()
        wait = self.reader.read(self.file, self.start, buffer.tensor)

        def send() -> Tensor:
            try:
                wait()
                return self.mover.lanes(device).back(buffer, self.flat.dtype).arrive()
            finally:
                self.mover.pool.give(buffer)

        return send

    @property
    def in_place(self) -> bool:
        return self.file.holds(self.flat, self.start)

    def keep(self, near: Tensor) -> None:
        near = near.cpu()
        if not torch.equal(near.view(torch.uint8), self.flat.view(torch.uint8)):  # pages written to are not the file's
            self.flat.copy_(near)

    def leave(self, device: torch.device) -> Tensor:
        if self.file.private and device.type == "cpu":  # where its owner had put it
            return self.flat
        return self.flat.to(device, copy=True)


class Reader:
    """A thread that reads files, so that the next weights are read while one computes with these."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def read(self, file: MappedFile, start: int, into: Tensor) -> Callable[[], None]:
        """Begin to read a part of a file into a flat tensor; what is returned waits for it."""
        if self._pool is None or self._process != os.getpid():  # a fork has no threads
            self._pool, self._process = ThreadPoolExecutor(1, thread_name_prefix="memopt-read"), os.getpid()
        data = into.view(torch.uint8).numpy()
        try:
            return self._pool.submit(file.fill, start, data).result
        except RuntimeError:  # the interpreter ends
            file.fill(start, data)
            return lambda: None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None


class Weight:
    """A parameter that comes and goes.

    Args:
        owner, name: the module whose parameter it is.
        device: where it is computed with; None: where it is.
    """

    def __init__(self, owner: nn.Module, name: str, device: torch.device | None = None) -> None:
        self.owner, self.name = owner, name
        self.parameter: nn.Parameter = owner._parameters[name]  # type: ignore[assignment]
        self.origin = self.parameter.device
        self.device = device or self.origin
        self.home: Home | None = None
        self.near: Tensor | None = None
        """Its data while it is there."""
        self.arrive: Callable[[], None] = lambda: None
        """Has it on the device."""
        self.written = False
        """Whether somebody may have written to it since its copy was begun, without autograd's notice."""
        self._away: Tensor | None = None  # its data while it is away
        self._version = version_of(self.parameter)
        self._grad: Tensor | None = None  # of the home's device, while the weight is on another
        self._hooks: list[Any] = []

    @property
    def bytes(self) -> int:
        return self.parameter.nbytes

    @property
    def is_used(self) -> bool:
        """Whether the module still has this parameter; one that was put in its place stays where it is."""
        return self.owner._parameters.get(self.name) is self.parameter

    @property
    def is_at_home(self) -> bool:
        """Whether its data are those that it was given when it settled."""
        if self._away is None or self.home is None or not self.home.in_place:
            return False
        return _same_place(self.parameter, self._away, self.home.flat)

    @property
    def strays(self) -> bool:
        """Whether it needs a home: it has none yet, or has got other data since."""
        return self.near is None and self.is_used and not self.is_at_home and can_leave(self.parameter)

    def settle(self, home: Home) -> None:
        """Move to a home."""
        data, grad = self.parameter.data, self.parameter.grad
        if storage_of(home.flat) != storage_of(data):
            with torch.no_grad(), off_the_books():
                home.flat.copy_(flat(data))
        self.home = home
        self._away = home.flat.as_strided(data.shape, data.stride(), int(home.flat.storage_offset()))
        self._become(self._away)
        lives(home.flat, home.tier)
        if grad is not None and grad.device != home.flat.device:
            self.parameter.grad = None
            self.parameter.grad = grad.to(home.flat.device)
        _account(self.parameter)
        self._watch_gradient()

    def _watch_gradient(self) -> None:
        if self._hooks or not (self.parameter.requires_grad and self.parameter.is_leaf):
            return
        if self.device.type != "cpu":  # a gradient is added where the weight is, so it has to be there
            self._hooks.append(self.parameter.register_hook(lambda grad: self.arrive()))
        weight = weakref.ref(self)  # such hooks are not seen by the garbage collector

        def arrived(parameter: Tensor) -> None:
            _account(parameter)
            if (found := weight()) is not None:
                hooks = parameter._post_accumulate_grad_hooks, parameter._backward_hooks
                found.written |= sum(len(some) for some in hooks if some) > len(found._hooks)

        self._hooks.append(self.parameter.register_post_accumulate_grad_hook(arrived))

    @property
    def _changed(self) -> bool:
        """Whether it is not, or may not be, what it was when its copy was begun."""
        return self.written or version_of(self.parameter) != self._version

    @property
    def size(self) -> tuple[int, torch.dtype]:
        """What two weights have in common of which one's copy can be made in the memory of the other's."""
        return self.parameter.numel(), self.parameter.dtype

    def begin(self, spare: Tensor | None) -> Arrival | None:
        """Begin to make the copy on the device; None for one that has no home."""
        if self.home is None or not self.is_used or not self.is_at_home:
            return None
        self._version, self.written = version_of(self.parameter), False
        with torch.inference_mode(False):
            return self.home.begin(self.device, spare)

    def come(self, near: Tensor) -> None:
        """Have the copy as its data."""
        if self._away is None or not self.is_at_home:  # somebody gave it other data meanwhile
            return
        moved(near, "device", "parameters")
        if self._changed:  # while it was on its way
            assert self.home is not None
            with torch.no_grad(), torch.inference_mode(False), off_the_books():
                near.copy_(self.home.flat)
            self._version, self.written = version_of(self.parameter), False
        self.near = near
        if self.device != self._away.device:
            self._grad, self.parameter.grad = self.parameter.grad, None
        self._become(near.as_strided(self._away.shape, self._away.stride()))
        self._watch_gradient()

    def go(self) -> Tensor | None:
        """Go home, with what was written to it. Whoever gave it other data meanwhile has his way.

        Returns:
            The memory of the copy, flat, if it may serve for another on a CPU: if nobody has a view of it.
        """
        near, self.near = self.near, None
        if near is not None:
            self._go_from(near)
            if near.device.type == "cpu" and type(near) is Tensor:
                return near if holders_of(near) == 1 else None
        return None

    def _go_from(self, near: Tensor) -> None:
        if self.home is None or self._away is None or storage_of(self.parameter) != storage_of(near):
            return
        if self._changed:
            with torch.no_grad(), torch.inference_mode(False), off_the_books():
                self.home.keep(near)
        if self.device == self._away.device:
            self._become(self._away)
            return
        new, old, self._grad, self.parameter.grad = self.parameter.grad, self._grad, None, None
        self._become(self._away)
        if new is not None:
            new = new.to(self._away.device)
            old = new if old is None else old.add_(new)
        self.parameter.grad = old
        _account(self.parameter)

    def stay(self) -> None:
        """Go back to the device that it came from, for good; at home if there is no room."""
        self.go()
        if self.home is not None and self.is_at_home:
            grad = self.parameter.grad
            data = self.home.leave(self.origin).as_strided(self.parameter.shape, self.parameter.stride())
            lives(self.home.flat, "device")
            if grad is not None:
                self.parameter.grad = None
            self._become(data)
            if grad is not None:
                lives(grad, "device")
                self.parameter.grad = grad.to(self.origin)
        while self._hooks:
            self._hooks.pop().remove()
        self.home = self._away = None

    def _become(self, data: Tensor) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            self.parameter.data = data


def _same_place(data: Tensor, away: Tensor, home: Tensor) -> bool:
    """Whether a tensor is the same view of the same memory as another, which still is that of the home."""
    if (data.dtype, data.shape, data.stride(), data.device) != (away.dtype, away.shape, away.stride(), away.device):
        return False
    if isinstance(data, FakeTensor):
        return storage_of(data) == storage_of(away) and data.storage_offset() == away.storage_offset()
    return data.data_ptr() == away.data_ptr() == home.data_ptr()


def flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, in order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), int(tensor.storage_offset()))


def _account(parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is not None and grad.layout is torch.strided:
        lives(grad, "cpu")


def find_homes(weights: Sequence[Weight], mover: Mover, folder: str | Path | None, reader: Reader) -> None:
    """Let weights that have none move to homes of the mover's tier.

    Raises:
        InputError, MemoptError: there is no folder, or no room in it; then no weight has moved.
    """
    if mover.to == "disk" and not any(isinstance(weight.parameter, FakeTensor) for weight in weights):
        _move_to_files(weights, mover, folder, reader)
        return
    for weight in weights:
        data = weight.parameter.data
        if data.device.type == "cuda":  # moved there by the user
            weight.device = weight.origin = data.device
        if weight.device.type == "cpu":
            weight.settle(Home(flat(data), mover.to))  # a fake one has no file
        else:
            weight.settle(HostHome(data, mover))


def _move_to_files(weights: Sequence[Weight], mover: Mover, folder: str | Path | None, reader: Reader) -> None:
    found = [MappedFile.of(weight.parameter.data) for weight in weights]
    sizes = [0 if place else -(-w.bytes // ALIGNMENT) * ALIGNMENT for w, place in zip(weights, found, strict=True)]
    ours = MappedFile.new(sum(sizes), folder) if any(sizes) else None
    start = 0
    for weight in weights:
        if weight.parameter.device.type == "cuda":
            weight.device = weight.origin = weight.parameter.device
    for weight, place, size in zip(weights, found, sizes, strict=True):
        data = weight.parameter.data
        if place is not None:  # there already
            weight.settle(FileHome(flat(data), *place, reader, mover))
        elif ours is not None:
            weight.settle(FileHome(ours.tensor(data.dtype, start, data.numel()), ours, start, reader, mover))
            ours.leave()
            start += size
