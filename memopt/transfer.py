"""Moving bytes from the device to another tier and back: the one place that knows streams, pinned memory and files.

Tiers are ``cpu``, memory of the host, and ``disk``, files in a folder of the process's own. A :class:`Mover` takes flat
tensors out (:meth:`Mover.out`) and gives :class:`Parked` ones, which can begin to come back (:meth:`Parked.fetch`)
before they are wanted (:meth:`Parked.get`).

On a CUDA device copies run on two streams of their own, one for each direction. Events order them with the computation:
an outgoing copy waits for what computes its source; a source is let go of only when its copy is done, or once the
computing stream is told to wait for it, whichever comes first, so that the caching allocator cannot hand its memory to
somebody who writes early; an incoming copy waits until its destination, which is allocated on the computing stream, is
free. Nothing here waits for the device on the host. On a CPU everything happens at once.

Host memory is taken from a pool and given back to it, pinned where that works. Fake tensors move the same way and take
no part in pools, streams and files; ledgers are told where their bytes are (`memopt.memory.moved`).
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memopt.errors import InputError
from memopt.memory.ledger import moved, off_the_books
from memopt.scratch import Scratch
from memopt.units import parse_bytes

Tier = Literal["cpu", "disk"]
Compression = Literal["bf16", "fp8"]


class Buffer:
    """Bytes of the host, [size] uint8, and the last use that a device makes of them."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.event: torch.cuda.Event | None = None

    def order(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for the last use."""
        if self.event is not None:
            stream.wait_event(self.event)

    def wait(self) -> None:
        """Let the host wait for the last use."""
        if self.event is not None:
            self.event.synchronize()


class Pool:
    """Host buffers by size, kept for the next one who asks.

    Args:
        pinned: bytes that may be pinned at a time, in use or not; more, and what the system refuses, is pageable.
        spare: bytes of buffers that are kept although nobody uses them.
    """

    def __init__(self, pinned: int, spare: int) -> None:
        self.pinned_budget, self.spare_budget = pinned, spare
        self.pinned_bytes = self.spare_bytes = 0
        self._free: dict[int, list[Buffer]] = {}
        self._order: deque[int] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> Buffer:
        """A buffer of this many bytes, of any content."""
        with self._lock:
            if self._free.get(size):
                self._order.remove(size)
                self.spare_bytes -= size
                return self._free[size].pop(0)
            pin = torch.cuda.is_available() and self.pinned_bytes + size <= self.pinned_budget
            if pin:
                self.pinned_bytes += size
        with off_the_books():
            if pin:
                try:
                    return Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=True))
                except RuntimeError:  # the system has no more to pin
                    with self._lock:
                        self.pinned_bytes -= size
            return Buffer(torch.empty(size, dtype=torch.uint8))

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back that nobody uses any more."""
        size = buffer.tensor.numel()
        with self._lock:
            self._free.setdefault(size, []).append(buffer)
            self._order.append(size)
            self.spare_bytes += size
            while self.spare_bytes > self.spare_budget:
                oldest = self._order.popleft()
                self.spare_bytes -= oldest
                if self._free[oldest].pop(0).tensor.is_pinned():
                    self.pinned_bytes -= oldest


class Mover:
    """Moves flat tensors to a tier and back.

    Args:
        to: the tier.
        folder: for ``disk``, where a folder is made that only this mover uses; by default in the system's folder for
            temporary files.
        compress: None, or what floating-point values are rounded to on the way: ``bf16`` (half the bytes of float32),
            ``fp8`` (e4m3 with one scale for each tensor, a quarter).
        pinned: bytes of host memory that may be pinned, or a text such as "8GiB".
        spare: bytes of unused host buffers to keep.
        in_flight: bytes of sources of outgoing copies that may wait for their copies; then computation waits.
    """

    def __init__(
        self,
        to: Tier = "cpu",
        *,
        folder: str | Path | None = None,
        compress: Compression | None = None,
        pinned: int | str = "64GiB",
        spare: int | str = "4GiB",
        in_flight: int | str = "1GiB",
    ) -> None:
        if to not in ("cpu", "disk"):
            raise InputError(f"to={to!r} is not one of cpu, disk")
        if compress not in (None, "bf16", "fp8"):
            raise InputError(f"compress={compress!r} is not one of bf16, fp8")
        if folder is not None and to != "disk":
            raise InputError("folder is for to='disk'")
        self.to, self.compress = to, compress
        self.pool = Pool(parse_bytes(pinned), parse_bytes(spare))
        self._in_flight = parse_bytes(in_flight)
        self._folder = folder
        self._scratch: Scratch | None = None
        self._lanes: dict[torch.device, _Lanes] = {}
        self._writer: ThreadPoolExecutor | None = None

    def out(self, flat: Tensor) -> Parked:
        """Move a copy of a contiguous one-dimensional tensor out. It may be changed or dropped at once afterwards."""
        return Parked(self, flat)

    def lanes(self, device: torch.device) -> _Lanes:
        """The streams of a CUDA device."""
        if device not in self._lanes:
            self._lanes[device] = _Lanes(device, self._in_flight)
        return self._lanes[device]

    @property
    def scratch(self) -> Scratch:
        """The folder of files, made when the first is written."""
        if self._scratch is None:
            self._scratch = Scratch(self._folder)
        return self._scratch

    @property
    def writer(self) -> ThreadPoolExecutor:
        """The thread that writes and reads files while a device computes."""
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "memopt-transfer")
        return self._writer

    def close(self) -> None:
        """Wait for the files, and remove them."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def slot(self, flat: Tensor) -> _Slot:
        """Begin to move one tensor's bytes out."""
        if isinstance(flat, FakeTensor):
            return _Fake(self, flat)
        if self.to == "disk":
            return _File(self, flat)
        return _Host(self, flat)


class Parked:
    """What a flat tensor held when it was moved out."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        payloads, self._decode = _encoded(flat, mover.compress)
        self._slots = [mover.slot(payload) for payload in payloads]

    def fetch(self) -> None:
        """Begin to bring it back, for a later ``get``."""
        for slot in self._slots:
            slot.fetch()

    def get(self) -> Tensor:
        """A new tensor on the device it came from."""
        return self._decode(*(slot.get() for slot in self._slots))


def _encoded(flat: Tensor, compress: Compression | None) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The tensors to move for a flat one, and what makes it of them again."""
    dtype = flat.dtype
    if compress is None or not dtype.is_floating_point or dtype.itemsize <= (2 if compress == "bf16" else 1):
        return [flat], lambda same: same
    if compress == "bf16":
        return [flat.to(torch.bfloat16)], lambda narrow: narrow.to(dtype)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (flat.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    narrow = (flat.float() / scale).to(torch.float8_e4m3fn)
    return [narrow], lambda narrow: (narrow.float() * scale).to(dtype)


class _Slot(ABC):
    """The bytes of one tensor on their tier."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        self.mover, self.device, self.dtype, self.numel = mover, flat.device, flat.dtype, flat.numel()
        self.bytes = self.numel * self.dtype.itemsize

    @abstractmethod
    def fetch(self) -> None:
        """Begin to bring them back, where that takes time."""

    @abstractmethod
    def get(self) -> Tensor:
        """A new tensor with them on the device."""


class _Fake(_Slot):
    """A fake tensor's: nothing but the account."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        with off_the_books():
            self.buffer = torch.empty(self.bytes, dtype=torch.uint8, device=flat.device)
        moved(self.buffer, mover.to)
        self._coming: Tensor | None = None

    def fetch(self) -> None:
        if self._coming is None:  # as on the device that it stands for
            self._coming = torch.empty(self.numel, dtype=self.dtype, device=self.device)

    def get(self) -> Tensor:
        self.fetch()
        flat, self._coming = self._coming, None
        assert flat is not None
        return flat


class _Host(_Slot):
    """In a buffer of the pool."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        self.buffer = mover.pool.take(self.bytes)
        weakref.finalize(self, mover.pool.give, self.buffer)
        moved(self.buffer.tensor, "cpu")
        self._coming: tuple[Tensor, torch.cuda.Event | None] | None = None
        if self.device.type == "cuda":
            mover.lanes(self.device).out(flat, self.buffer)
        else:
            self.buffer.tensor.view(self.dtype).copy_(flat)

    def fetch(self) -> None:
        if self._coming is None and self.device.type == "cuda":
            self._coming = self.mover.lanes(self.device).back(self.buffer, self.dtype)
        elif self._coming is None:
            self._coming = self.buffer.tensor.view(self.dtype).clone(), None

    def get(self) -> Tensor:
        self.fetch()
        assert self._coming is not None
        (flat, done), self._coming = self._coming, None
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return flat

    def __del__(self) -> None:
        coming = getattr(self, "_coming", None)
        if coming is not None and coming[1] is not None:  # not wanted: its memory must not be used before the copy
            torch.cuda.current_stream(self.device).wait_event(coming[1])


class _File(_Slot):
    """In a file. A CUDA device's bytes go through a buffer, and the files have a thread of their own."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        self.scratch = mover.scratch
        self.file = self.scratch.new()
        weakref.finalize(self, self.scratch.drop, self.file)
        self._coming: Future[Buffer] | None = None
        self._read: Tensor | None = None
        if self.device.type != "cuda":
            self.scratch.write(self.file, flat.view(torch.uint8).numpy())
            return
        buffer = mover.pool.take(self.bytes)
        mover.lanes(self.device).out(flat, buffer)
        self._written = mover.writer.submit(_write, mover, self.file, buffer)

    def fetch(self) -> None:
        if self.device.type == "cuda":
            if self._coming is None:
                self._coming = self.mover.writer.submit(_read, self.mover, self.file, self.bytes)
        elif self._read is None:
            flat = torch.empty(self.numel, dtype=self.dtype)
            self.scratch.read(self.file, flat.view(torch.uint8).numpy())
            self._read = flat

    def get(self) -> Tensor:
        if self.device.type != "cuda":
            self.fetch()
            assert self._read is not None
            near, self._read = self._read, None
            return near
        self._written.result()  # what went wrong there is told here
        self.fetch()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        buffer = coming.result()
        flat, done = self.mover.lanes(self.device).back(buffer, self.dtype)
        torch.cuda.current_stream(self.device).wait_event(done)
        self.mover.pool.give(buffer)
        return flat


def _write(mover: Mover, file: Path, buffer: Buffer) -> None:
    try:
        buffer.wait()
        mover.scratch.write(file, buffer.tensor.numpy())
    finally:
        mover.pool.give(buffer)


def _read(mover: Mover, file: Path, size: int) -> Buffer:
    buffer = mover.pool.take(size)
    try:
        buffer.wait()
        mover.scratch.read(file, buffer.tensor.numpy())
    except BaseException:
        mover.pool.give(buffer)
        raise
    return buffer


class _Lanes:
    """The two streams of a CUDA device, and the sources whose copies may not be done."""

    def __init__(self, device: torch.device, in_flight: int) -> None:
        self.device, self.limit = device, in_flight
        self.outward, self.homeward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._sources: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._bytes = 0

    def out(self, flat: Tensor, buffer: Buffer) -> None:
        """Copy a tensor to a buffer, after what computes it and after the buffer's last use."""
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        buffer.order(self.outward)
        with torch.cuda.stream(self.outward):
            buffer.tensor.view(flat.dtype).copy_(flat, non_blocking=True)
        buffer.event = self.outward.record_event()
        self._sources.append((buffer.event, flat))
        self._bytes += flat.nbytes
        while self._sources and (self._bytes > self.limit or self._sources[0][0].query()):
            event, source = self._sources.popleft()
            # From here the allocator may give its memory to later work of this stream, which must come after the copy.
            torch.cuda.current_stream(self.device).wait_event(event)
            self._bytes -= source.nbytes

    def back(self, buffer: Buffer, dtype: torch.dtype) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a buffer to a new tensor; the event tells when it is there."""
        flat = torch.empty(buffer.tensor.numel() // dtype.itemsize, dtype=dtype, device=self.device)
        self.homeward.wait_stream(torch.cuda.current_stream(self.device))
        buffer.order(self.homeward)
        with torch.cuda.stream(self.homeward):
            flat.copy_(buffer.tensor.view(dtype), non_blocking=True)
        buffer.event = self.homeward.record_event()
        return flat, buffer.event
