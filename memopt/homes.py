"""Where weights live while they are away from the device, and how they come.

A home is a flat tensor that anybody may read and write: the memory that a parameter has on a CPU, pinned memory for a
CUDA device, or a part of a mapped file. A :class:`Weight` is a parameter that has its home as its data while it is away
and a copy on the device while it is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from memopt.mapped import MappedFile
from memopt.memory.ledger import lives, moved, off_the_books
from memopt.tensors import PLAIN, storage_of, version_of
from memopt.transfer import Mover, Tier

ALIGNMENT = 64
"""Bytes: where a weight may begin in a file."""

Arrival = Callable[[], Tensor]
"""Waits for a copy that is under way, and gives it."""


def can_leave(parameter: Tensor) -> bool:
    """Whether a parameter is plain memory that can be put down elsewhere and made again."""
    if type(parameter) not in PLAIN or parameter.layout is not torch.strided or not parameter.numel():
        return False
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(parameter)
    return dense and parameter.device.type in ("cpu", "cuda")


class Home:
    """The memory that a parameter on the CPU has anyhow."""

    tier: Tier = "cpu"

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def begin(self, device: torch.device, *, written: bool) -> Arrival:
        """Begin to make a copy on a device.

        Args:
            written: whether the home may have been written to, other than by this module.
        """
        near = torch.empty(self.flat.numel(), dtype=self.flat.dtype, device=device)
        with torch.no_grad(), off_the_books():
            near.copy_(self.flat)
        return lambda: near

    def restored(self, device: torch.device) -> Tensor | None:
        """A copy on the device, if this home cannot stay; flat."""
        return None


class HostHome(Home):
    """Host memory that is not the device's, pinned if possible."""

    def __init__(self, data: Tensor, mover: Mover) -> None:
        self.buffer, self.mover = mover.pool.take(data.nbytes), mover
        self.buffer.wait()
        super().__init__(self.buffer.tensor.view(data.dtype))

    def begin(self, device: torch.device, *, written: bool) -> Arrival:
        return self.mover.lanes(device).back(self.buffer, self.flat.dtype).arrive

    def restored(self, device: torch.device) -> Tensor | None:
        self.buffer.wait()
        return self.flat.to(device)


class FileHome(Home):
    """A part of a mapped file."""

    tier: Tier = "disk"

    def __init__(self, flat: Tensor, file: MappedFile, start: int, reader: Reader, mover: Mover) -> None:
        super().__init__(flat)
        self.file, self.start, self.reader, self.mover = file, start, reader, mover

    def begin(self, device: torch.device, *, written: bool) -> Arrival:
        if self.file.private and written:  # what is written to private pages is not in the file
            return super().begin(device, written=True)
        if device.type == "cpu":
            near = torch.empty(self.flat.numel(), dtype=self.flat.dtype)
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

    def restored(self, device: torch.device) -> Tensor | None:
        if self.file.private and device.type == "cpu":  # where its owner had put it
            return None
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
        return self._pool.submit(file.fill, start, into.view(torch.uint8).numpy()).result

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
        self.device = device or self.parameter.device
        self.home: Home | None = None
        self.near: Tensor | None = None
        """Its data while it is there."""
        self._version = self._settled = version_of(self.parameter)
        self._hooks: list[Any] = []

    @property
    def bytes(self) -> int:
        return self.parameter.nbytes

    @property
    def strayed(self) -> bool:
        """Whether it has no home, or has got other data since it went there."""
        parameter = self.owner._parameters.get(self.name)
        if parameter is not self.parameter and isinstance(parameter, nn.Parameter):
            self.forget()
            self.parameter = parameter
        if self.home is None or self.parameter.device.type == "cuda":
            return self.near is None
        same = storage_of(self.parameter) == storage_of(self.home.flat) and self.parameter.dtype == self.home.flat.dtype
        return not same and self.near is None

    def settle(self, home: Home) -> None:
        """Move to a home."""
        data, grad = self.parameter.data, self.parameter.grad
        if data.device.type == "cuda":  # moved there by the user
            self.device = data.device
        with torch.no_grad(), off_the_books():
            if storage_of(home.flat) != storage_of(data):
                home.flat.copy_(flat(data))
        self.home = home
        self._become(home.flat.as_strided(data.shape, data.stride()))
        self._settled = version_of(self.parameter)
        lives(home.flat, home.tier)
        if grad is not None and grad.device != home.flat.device:
            self.parameter.grad = None
            self.parameter.grad = grad.to(home.flat.device)
        _account(self.parameter)
        self._watch_gradient()

    def _watch_gradient(self) -> None:
        """Let gradients go where the weight lives, which is where optimizers expect them."""
        if self._hooks or not (self.parameter.requires_grad and self.parameter.is_leaf):
            return
        if self.device.type != "cpu":
            self._hooks.append(self.parameter.register_hook(_to_host))
        self._hooks.append(self.parameter.register_post_accumulate_grad_hook(_account))

    def begin(self) -> Arrival:
        """Begin to make the copy on the device."""
        assert self.home is not None
        with torch.inference_mode(False):
            return self.home.begin(self.device, written=version_of(self.parameter) != self._settled)

    def come(self, near: Tensor) -> None:
        """Have the copy as its data."""
        data = self.parameter.data
        moved(near, "device", "parameters")
        self._version = version_of(self.parameter)
        self.near = near
        self._become(near.as_strided(data.shape, data.stride()))
        self._watch_gradient()

    def go(self) -> None:
        """Go home, with what was written to it. Whoever gave it other data meanwhile has his way."""
        near, self.near = self.near, None
        if near is None or self.home is None or storage_of(self.parameter) != storage_of(near):
            return
        if version_of(self.parameter) != self._version:
            with torch.no_grad(), torch.inference_mode(False), off_the_books():
                self.home.flat.copy_(near)
        self._become(self.home.flat.as_strided(self.parameter.shape, self.parameter.stride()))

    def stay(self) -> None:
        """Stay on the device from now on."""
        self.go()
        if self.home is not None and not self.strayed:
            lives(self.home.flat, "device")
            data, grad = self.home.restored(self.device), self.parameter.grad
            if data is not None:
                self._become(data.as_strided(self.parameter.shape, self.parameter.stride()))
            if grad is not None:
                lives(grad, "device")
                if grad.device != self.device:
                    self.parameter.grad = None
                    self.parameter.grad = grad.to(self.device)
        self.forget()

    def forget(self) -> None:
        """Leave the parameter as it is."""
        while self._hooks:
            self._hooks.pop().remove()
        self.home = self.near = None

    def _become(self, data: Tensor) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            self.parameter.data = data


def flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, in order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _to_host(grad: Tensor) -> Tensor:
    return grad.to("cpu")


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
        if weight.device.type == "cpu":
            home = Home(flat(data))
            home.tier = mover.to  # of a fake one, which no file has
            weight.settle(home)
        else:
            weight.settle(HostHome(data, mover))


def _move_to_files(weights: Sequence[Weight], mover: Mover, folder: str | Path | None, reader: Reader) -> None:
    found = [MappedFile.of(weight.parameter.data) for weight in weights]
    sizes = [0 if place else -(-w.bytes // ALIGNMENT) * ALIGNMENT for w, place in zip(weights, found, strict=True)]
    ours = MappedFile.new(sum(sizes), folder) if any(sizes) else None
    start = 0
    for weight, place, size in zip(weights, found, sizes, strict=True):
        data = weight.parameter.data
        if place is not None:  # there already
            weight.settle(FileHome(flat(data), *place, reader, mover))
        elif ours is not None:
            weight.settle(FileHome(ours.tensor(data.dtype, start, data.numel()), ours, start, reader, mover))
            ours.leave()
            start += size
