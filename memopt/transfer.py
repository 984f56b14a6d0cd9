"""Moving bytes from the device to another tier and back: the one place that knows streams, pinned memory and files.

Tiers are ``cpu``, memory of the host, and ``disk``, files in a folder of the process's own. A :class:`Mover` takes flat
tensors out (:meth:`Mover.out`) and gives :class:`Parked` ones, which can begin to come back (:meth:`Parked.fetch`)
before they are wanted (:meth:`Parked.get`).

On a CUDA device copies run on two streams of their own, one for each direction. Events order them with the computation:
an outgoing copy waits for what computes its source; a source is let go of only once its copy is done, or the stream
that computed it is told to wait for the copy, so that the caching allocator cannot hand its memory to somebody who
writes early; an incoming copy waits until its destination, which is allocated on the computing stream, is free. The
host waits only where memory could not be pinned. On a CPU copies happen at once.

Files are written and read by a thread of the mover's (`memopt.scratch.Worker`), from and to host memory. It begins no
copies and makes no tensors: that is done where the caller is. What is asked for before its file is written comes from
the buffer that waits for that; what is dropped before is never written. A write that failed is an error in the next
``out``, or in the ``get`` of the tensor that is lost by it; a read that failed, in its ``get``.

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
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from memopt.compression import Compression, check, encode
from memopt.errors import InputError, MemoptError
from memopt.memory.ledger import moved, off_the_books
from memopt.scratch import Scratch, Worker, Write
from memopt.units import parse_bytes

Tier = Literal["cpu", "disk"]


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

    def ready(self) -> Callable[[], None]:
        """What waits, in any thread, for the last use until now."""
        event = self.event

        def wait() -> None:
            if event is not None:
                with torch.cuda.device(event.device):  # a thread begins on device 0 and would take memory there
                    event.synchronize()

        return wait


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
        compress: None, or what floating-point values are rounded to on the way: ``bf16``, ``fp8`` or ``int8`` (by
            bitsandbytes); memopt.compression has the bounds of the error.
        pinned: bytes of host memory that may be pinned, or a text such as "8GiB".
        spare: bytes of unused host buffers to keep; for ``disk`` at most ``in_flight``.
        in_flight: bytes of sources of outgoing copies that may wait for their copies; then computation waits. For
            ``disk`` also bytes of host buffers that may wait to be written; then the caller waits.

    Raises:
        InputError: one of these is no such value, or bitsandbytes is not installed.
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
        check(compress)
        if folder is not None and to != "disk":
            raise InputError("folder is for to='disk'")
        self.to, self.compress = to, compress
        self._in_flight = parse_bytes(in_flight)
        spare_bytes = parse_bytes(spare)
        self.pool = Pool(parse_bytes(pinned), min(spare_bytes, self._in_flight) if to == "disk" else spare_bytes)
        self._folder = folder
        self._scratch: Scratch | None = None
        self._worker: Worker | None = None
        self._lanes: dict[torch.device, _Lanes] = {}
        self.lock = threading.RLock()
        """Held while something begins to move: autograd has a thread for each device."""

    def out(self, flat: Tensor) -> Parked:
        """Move a copy of a contiguous one-dimensional tensor out. It may be changed or dropped at once afterwards.

        Raises:
            MemoptError: a file could not be written, perhaps of what went out before: that one is lost, no other.
        """
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

    @property
    def worker(self) -> Worker:
        """The thread for files, begun when the first is written, in a forked process anew."""
        if self._worker is None or not self._worker.mine:
            self._worker = Worker(self._in_flight)
        return self._worker

    def close(self) -> None:
        """Remove the files, once the thread is done with them."""
        if self._worker is not None and self._worker.mine:
            self._worker.end()
            self._worker = None
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
        payload, self._decode = encode(flat, mover.compress)
        with mover.lock:
            self._slot = mover.slot(payload)
        self._ready: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def fetch(self) -> None:
        """Begin to bring it back, for a later ``get``."""
        with self._mover.lock:
            self._slot.fetch()

    def get(self) -> Tensor:
        """A new tensor on the device it came from.

        Raises:
            MemoptError: its file could not be written or read.
        """
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


class _Slot(ABC):
    """The bytes of one tensor on their tier."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        self.mover, self.device, self.dtype, self.numel = mover, flat.device, flat.dtype, flat.numel()
        self.bytes = self.numel * self.dtype.itemsize
        self._coming: _Coming | _Reading | None = None

    @abstractmethod
    def _begin(self) -> _Coming | _Reading:
        """Begin to bring them back."""

    def _from(self, buffer: Buffer) -> _Coming:
        """Begin to bring them back from a buffer."""
        if self.device.type == "cuda":
            return self.mover.lanes(self.device).back(buffer, self.dtype)
        return _Coming(buffer.tensor.view(self.dtype).clone())

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
        self.lent = _Lent(mover.pool, self.bytes)
        self.lent.fill(mover, flat)

    def _begin(self) -> _Coming:
        return self._from(self.lent.buffer)


class _File(_Slot):
    """In a file, once the thread has written it; until then in a buffer."""

    def __init__(self, mover: Mover, flat: Tensor) -> None:
        super().__init__(mover, flat)
        mover.worker.make_room(self.bytes)
        lent = _Lent(mover.pool, self.bytes)
        lent.fill(mover, flat)
        self.write = Write(mover.scratch, lent, self.bytes)
        weakref.finalize(self, self.write.drop)
        mover.worker.put(self.write)

    def _begin(self) -> _Coming | _Reading:
        write = self.write
        unwritten = write.source
        if unwritten is not None:
            return self._from(unwritten.buffer)
        data: Callable[[], Any]
        coming: Callable[[], _Coming]
        if self.device.type == "cuda":
            lanes, dtype, lent = self.mover.lanes(self.device), self.dtype, _Lent(self.mover.pool, self.bytes)
            data, coming = lent.data, lambda: lanes.back(lent.buffer, dtype)
        else:
            flat = torch.empty(self.numel, dtype=self.dtype)
            data, coming = flat.view(torch.uint8).numpy, lambda: _Coming(flat)
        return _Reading(self.mover.worker.begin(lambda: write.read(data)), coming)

    def get(self) -> Tensor:
        try:
            return super().get()
        except MemoptError:
            self.mover.worker.drain()  # other errors of the same cause are not for the next step
            raise


class _Lent:
    """A buffer of the pool, which has it back with the last reference."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.buffer = pool.take(size)
        self._pool, self._ready = pool, self.buffer.ready()
        moved(self.buffer.tensor, "cpu")

    def fill(self, mover: Mover, flat: Tensor) -> None:
        """Copy a tensor there, or begin to."""
        if flat.device.type == "cuda":
            mover.lanes(flat.device).out(flat, self.buffer)
            self._ready = self.buffer.ready()
        else:
            self.buffer.wait()  # a device may still read it for who had it before
            self.buffer.tensor.view(flat.dtype).copy_(flat)

    def data(self) -> Any:
        """The bytes, for any thread, once no device uses them as it did when they were lent or filled."""
        self._ready()
        return self.buffer.tensor.numpy()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.give(self.buffer)


class _Reading:
    """A file that the thread reads, and what brings its bytes to the device after that."""

    def __init__(self, wait: Callable[[], None], coming: Callable[[], _Coming]) -> None:
        self._wait, self._coming = wait, coming

    def arrive(self) -> Tensor:
        """The tensor, for the current stream to use."""
        self._wait()
        return self._coming().arrive()


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
        while self._sources and torch._C._current_graph_task_id() != -1:  # nothing should wait for the next forward
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
