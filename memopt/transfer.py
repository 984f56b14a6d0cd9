"""Moving bytes from the device to another tier and back: the one place that knows streams, pinned memory and files.

Tiers are ``cpu``, memory of the host, and ``disk``, files in a folder of the process's own. A :class:`Mover` takes flat
tensors out (:meth:`Mover.out`) and gives :class:`Parked` ones, which can begin to come back (:meth:`Parked.fetch`)
before they are wanted (:meth:`Parked.get`).

On a CUDA device copies run on two streams of their own, one for each direction. Events order them with the computation:
an outgoing copy waits for what computes its source; a source is let go of only once its copy is done, or the stream
that computed it is told to wait for the copy, so that the caching allocator cannot hand its memory to somebody who
writes early; an incoming copy waits until its destination, which is allocated on the computing stream, is free. The
host waits for files alone, and where memory could not be pinned. On a CPU everything happens at once.

Host memory is taken from a pool and given back to it, pinned where that works. Fake tensors move the same way and take
no part in pools, streams and files; ledgers are told where their bytes are (`memopt.memory.moved`).
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
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
            self.event = None


class Pool:
    """Host buffers by size, kept for the next one who asks.

    Args:
        pinned: bytes that may be pinned at a time, in use or not; more, and what the system refuses, is pageable.
        spare: bytes of buffers that are kept although nobody uses them.
    """

    def __init__(self, pinned: int, spare: int) -> None:
        self.pinned_budget, self.spare_budget = pinned, spare
        self.pinned_bytes = 0
        self._spare_bytes = 0
        self._free: dict[int, list[Buffer]] = {}
        self._order: deque[int] = deque()
        self._lock = threading.Lock()
        self._given: deque[Buffer] = deque()

    @property
    def spare_bytes(self) -> int:
        """Bytes of buffers that nobody uses."""
        with self._lock:
            self._collect()
            return self._spare_bytes

    def take(self, size: int) -> Buffer:
        """A buffer of this many bytes, of any content."""
        with self._lock:
            self._collect()
            if self._free.get(size):
                self._order.remove(size)
                self._spare_bytes -= size
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
        """Take a buffer back that nobody uses any more; finalizers may at any moment, also while the lock is held."""
        self._given.append(buffer)

    def _collect(self) -> None:
        """Put what was given back in its place, and let go of the oldest beyond the budget."""
        while self._given:
            buffer = self._given.popleft()
            size = buffer.tensor.numel()
            self._free.setdefault(size, []).append(buffer)
            self._order.append(size)
            self._spare_bytes += size
        while self._spare_bytes > self.spare_budget:
            oldest = self._order.popleft()
            self._spare_bytes -= oldest
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
        self.lock = threading.RLock()
        """Held while something begins to move: autograd has a thread for each device."""

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
        """The folder of files, made when the first is written, in a forked process anew."""
        if self._scratch is None or not self._scratch.mine:
            self._scratch = Scratch(self._folder)
        return self._scratch

    def close(self) -> None:
        """Remove the files."""
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
        self._mover = mover
        payload, self._decode = _encoded(flat, mover.compress)
        with mover.lock:
            self._slot = mover.slot(payload)
        self._ready: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Begin to bring it back, for a later ``get``."""
        with self._mover.lock:
            self._slot.fetch()

    def get(self) -> Tensor:
        """A new tensor on the device it came from."""
        with self._mover.lock:
            flat = self._decode(self._slot.get())
            if flat.device.type == "cuda" and not isinstance(flat, FakeTensor):
                stream = torch.cuda.current_stream(flat.device)
                self._ready = stream, stream.record_event()
            return flat

    def share(self, flat: Tensor) -> None:
        """Let the current stream use what ``get`` gave, perhaps on another stream."""
        if self._ready is not None and (stream := torch.cuda.current_stream(flat.device)) != self._ready[0]:
            stream.wait_event(self._ready[1])
            flat.record_stream(stream)


def _encoded(flat: Tensor, compress: Compression | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What to move for a flat tensor, and what makes it of that again."""
    dtype = flat.dtype
    if compress == "bf16" and dtype in (torch.float32, torch.float64):
        return flat.to(torch.bfloat16), lambda narrow: narrow.to(dtype)
    if compress == "fp8" and dtype in (torch.float32, torch.bfloat16, torch.float16) and flat.numel():
        wide = flat.float()
        largest = torch.where(wide.isfinite(), wide, 0).abs().amax()
        scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=torch.finfo(torch.float32).tiny)
        finite = torch.where(wide.isfinite(), wide / scale, torch.nan)  # an infinity would become a number
        return finite.to(torch.float8_e4m3fn), lambda narrow: (narrow.float() * scale).to(dtype)
    return flat, lambda same: same


class _Slot(ABC):
    """The bytes of one tensor on their tier."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        self.mover, self.device, self.dtype, self.numel = mover, flat.device, flat.dtype, flat.numel()
        self.bytes = self.numel * self.dtype.itemsize

        self._coming: _Coming | None = None

    @abstractmethod
    def _begin(self) -> _Coming:
        """Begin to bring them back."""

    def fetch(self) -> None:
        """Begin to bring them back, if that was not begun."""
        if self._coming is None:
            self._coming = self._begin()

    def get(self) -> Tensor:
        """A new tensor with them on the device."""
        coming, self._coming = self._coming or self._begin(), None
        return coming.arrive()


class _Fake(_Slot):
    """A fake tensor's: nothing but the account."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        with off_the_books():
            self.buffer = flat.new_empty(self.bytes, dtype=torch.uint8)
        moved(self.buffer, mover.to)

    def _begin(self) -> _Coming:
        return _Coming(torch.empty(self.numel, dtype=self.dtype, device=self.device))


class _Host(_Slot):
    """In a buffer of the pool."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        self.buffer = mover.pool.take(self.bytes)
        weakref.finalize(self, mover.pool.give, self.buffer)
        moved(self.buffer.tensor, "cpu")
        if self.device.type == "cuda":
            mover.lanes(self.device).out(flat, self.buffer)
        else:
            self.buffer.wait()  # a device may still read it for who had it before
            self.buffer.tensor.view(self.dtype).copy_(flat)

    def _begin(self) -> _Coming:
        if self.device.type == "cuda":
            return self.mover.lanes(self.device).back(self.buffer, self.dtype)
        return _Coming(self.buffer.tensor.view(self.dtype).clone())


class _File(_Slot):
    """In a file. The host waits for it; a CUDA device's bytes go through a buffer."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        self.scratch = mover.scratch
        self.file = self.scratch.new()
        weakref.finalize(self, self.scratch.drop, self.file)
        if self.device.type != "cuda":
            self.scratch.write(self.file, flat.view(torch.uint8).numpy())
            return
        buffer = mover.pool.take(self.bytes)
        try:
            mover.lanes(self.device).out(flat, buffer)
            buffer.wait()
            self.scratch.write(self.file, buffer.tensor.numpy())
        finally:
            mover.pool.give(buffer)

    def _begin(self) -> _Coming:
        if self.device.type != "cuda":
            flat = torch.empty(self.numel, dtype=self.dtype)
            self.scratch.read(self.file, flat.view(torch.uint8).numpy())
            return _Coming(flat)
        buffer = self.mover.pool.take(self.bytes)
        try:
            buffer.wait()
            self.scratch.read(self.file, buffer.tensor.numpy())
            return self.mover.lanes(self.device).back(buffer, self.dtype)
        finally:
            self.mover.pool.give(buffer)


class _Coming:
    """A tensor to which a copy may be under way, on whose stream its memory was allocated, and when it is there."""

    def __init__(
        self, flat: Tensor, stream: torch.cuda.Stream | None = None, done: torch.cuda.Event | None = None
    ) -> None:
        self.flat, self.stream, self.done = flat, stream, done

    def arrive(self) -> Tensor:
        """The tensor, for the current stream to use."""
        if self.stream is not None and self.done is not None:
            current = torch.cuda.current_stream(self.flat.device)
            current.wait_event(self.done)
            if current != self.stream:
                self.stream.wait_event(self.done)
                self.flat.record_stream(current)
            self.done = None
        return self.flat

    def __del__(self) -> None:
        if self.stream is not None and self.done is not None:  # not wanted: others may have its memory after the copy
            self.stream.wait_event(self.done)


class _Lanes:
    """The two streams of a CUDA device, and the sources whose copies may not be done."""

    def __init__(self, device: torch.device, in_flight: int) -> None:
        self.device, self.limit = device, in_flight
        self.outward, self.homeward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._sources: deque[tuple[torch.cuda.Event, torch.cuda.Stream, Tensor]] = deque()
        self._bytes = 0

    def out(self, flat: Tensor, buffer: Buffer) -> None:
        """Copy a tensor to a buffer, after what computes it and after the buffer's last use."""
        computing = torch.cuda.current_stream(self.device)
        self.outward.wait_stream(computing)
        buffer.order(self.outward)
        with torch.cuda.stream(self.outward):
            buffer.tensor.view(flat.dtype).copy_(flat, non_blocking=True)
        buffer.event = self.outward.record_event()
        self._sources.append((buffer.event, computing, flat))
        self._bytes += flat.untyped_storage().nbytes()
        while self._sources and (self._bytes > self.limit or self._sources[0][0].query()):
            self._let_go()

    def back(self, buffer: Buffer, dtype: torch.dtype) -> _Coming:
        """Begin to copy a buffer to a new tensor."""
        while self._sources:  # forward is over: nothing of it should wait for the next
            self._let_go()
        computing = torch.cuda.current_stream(self.device)
        flat = torch.empty(buffer.tensor.numel() // dtype.itemsize, dtype=dtype, device=self.device)
        self.homeward.wait_stream(computing)
        buffer.order(self.homeward)
        with torch.cuda.stream(self.homeward):
            flat.copy_(buffer.tensor.view(dtype), non_blocking=True)
        buffer.event = self.homeward.record_event()
        return _Coming(flat, computing, buffer.event)

    def _let_go(self) -> None:
        """Drop the oldest source: the allocator may give its memory to later work of its stream, after the copy."""
        event, computing, source = self._sources.popleft()
        computing.wait_event(event)
        self._bytes -= source.untyped_storage().nbytes()
