"""A folder of files that one process uses and nobody else: gone when it ends, however it ends.

The folder is ``memopt-<random>`` inside a given one, with a file ``memopt.lock`` that is locked for as long as the
process lives. Whoever makes a folder beside it removes those whose lock is free and names this machine: what killed
processes have left. A forked process leaves the folder alone.

A :class:`Worker` is a thread that writes and reads them beside the computation. It takes no lock that others wait for,
so a fork at any moment and finalizers in any thread are safe; in a forked process work that the thread had not done is
done by who waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import platform
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from memopt.errors import InputError, MemoptError

_PREFIX, LOCK = "memopt-", "memopt.lock"


class Scratch:
    """Makes, writes, reads and removes files.

    Args:
        folder: where the folder is made; by default the system's for temporary files.

    Raises:
        InputError: that cannot be written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        home = Path(folder) if folder is not None else Path(tempfile.gettempdir())
        _sweep(home)
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
            self._lock = os.open(self.folder / "making", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, _mark())
            os.rename(self.folder / "making", self.folder / LOCK)  # locked from the start
        except OSError as error:
            raise InputError(f"cannot keep files in {home}: {error.strerror}") from None
        self._names = itertools.count()
        # Finalizers drop files at any moment, in any thread: no lock, and keys whose hash runs no code of Python's.
        self._sums: dict[str, tuple[int, int]] = {}
        self._process = os.getpid()
        self._remove = weakref.finalize(self, _remove, self.folder, self._lock, self._process)

    @property
    def mine(self) -> bool:
        """Whether this is the process that made the folder, and not a fork of it."""
        return self._process == os.getpid()

    def new(self) -> Path:
        """The name of a new file."""
        return self.folder / str(next(self._names))

    def write(self, file: Path, data: Any) -> None:
        """Write a buffer of bytes.

        Raises:
            MemoptError: it could not be written; nothing of it is left.
        """
        view = memoryview(data).cast("B")
        try:
            with open(file, "wb", buffering=0) as stream:
                written = 0
                while written < len(view):
                    written += stream.write(view[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            hint = " Choose another folder, or offload less." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise MemoptError(f"cannot write {len(view):,} bytes to {file}: {error.strerror}.{hint}") from None
        self._sums[file.name] = len(view), zlib.crc32(view)

    def read(self, file: Path, data: Any) -> None:
        """Read a file into a buffer of its size.

        Raises:
            MemoptError: it is not there, or not what was written.
        """
        view = memoryview(data).cast("B")
        try:
            with open(file, "rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                read = 0
                while read < len(view) and (count := stream.readinto(view[read:])):
                    read += count
        except OSError as error:
            raise MemoptError(f"cannot read {file}, which this process wrote: {error.strerror}") from None
        expected = self._sums.get(file.name)
        if expected != (size, zlib.crc32(view)):
            raise MemoptError(f"{file} is not what this process wrote: somebody else changed it")

    def drop(self, file: Path) -> None:
        """Remove a file, unless this is a fork of the process that wrote it."""
        self._sums.pop(file.name, None)
        if self.mine:
            with contextlib.suppress(OSError):
                os.unlink(file)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        self._remove()


class Write:
    """A file to write, unless nobody wants it any more. Finalizers drop it in any thread, and so without locks.

    Args:
        scratch: where.
        source: has ``data()``, which gives the buffer of bytes.
        size: of that, in bytes.
    """

    def __init__(self, scratch: Scratch, source: Any, size: int) -> None:
        self.scratch, self.file, self.size = scratch, scratch.new(), size
        self.source = source
        """None once it is written, or failed to be, or is dropped."""
        self.error: BaseException | None = None
        self.dropped = False

    def run(self) -> None:
        """Write it."""
        source = self.source
        try:
            if source is not None:
                self.scratch.write(self.file, source.data())
        except BaseException as error:
            self.error = error.with_traceback(None)
        finally:
            self.source = source = None  # only now, when there is a file or an error
        if self.dropped:  # perhaps before there was a file
            self.scratch.drop(self.file)

    def read(self, data: Callable[[], Any]) -> None:
        """Read it into a buffer of its size.

        Raises:
            MemoptError: it is not there, not what was written, or could not be written.
        """
        if self.error is not None:
            raise self.error
        self.scratch.read(self.file, data())

    def drop(self) -> None:
        """Remove the file, or keep it from being written."""
        self.dropped = True  # first: what a thread writes from now on, it removes
        self.source = None
        self.scratch.drop(self.file)


class Worker:
    """A thread of one process that works on files, in order. It ends with its owner, or with the interpreter.

    Args:
        limit: bytes that may wait to be written.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._process = limit, os.getpid()
        self._thread = ThreadPoolExecutor(1, "memopt-files")
        self._writes: deque[tuple[Write, Callable[[], None]]] = deque()

    @property
    def mine(self) -> bool:
        """Whether the thread is of this process, and not of the one that it was forked from."""
        return self._process == os.getpid()

    @property
    def pending(self) -> int:
        """Bytes that wait to be written."""
        return sum(write.size for write, _ in self._writes if write.source is not None)

    def begin(self, work: Callable[[], None]) -> Callable[[], None]:
        """Give the thread something to do. What is returned waits until it is done, and raises what that raised."""
        try:
            future = self._thread.submit(work)
        except RuntimeError:  # no thread can be had, or the interpreter ends
            self._thread.shutdown(wait=False, cancel_futures=True)  # nor shall one do this later
            return work
        return lambda: future.result() if self.mine else work()

    def make_room(self, size: int) -> None:
        """Wait until so many bytes more may wait.

        Raises:
            MemoptError: something could not be written that somebody may ask for.
        """
        while self._writes and (self._writes[0][0].source is None or self.pending + size > self._limit):
            write = self._oldest()
            if write.error is not None and not write.dropped:
                self.drain()
                raise write.error

    def put(self, write: Write) -> None:
        """Let the thread write."""
        self._writes.append((write, self.begin(write.run)))

    def drain(self) -> None:
        """Wait until all is written, or failed to be; errors are left to who asks for what is lost."""
        while self._writes:
            self._oldest()

    def end(self) -> None:
        """Wait until everything is done."""
        self._thread.shutdown()

    def _oldest(self) -> Write:
        write, wait = self._writes[0]
        if write.source is not None:
            wait()
        self._writes.popleft()
        return write


def _remove(folder: Path, lock: int, process: int) -> None:
    if process == os.getpid():
        for name in os.listdir(folder) if folder.is_dir() else ():
            if name.isdigit():
                with contextlib.suppress(OSError):
                    os.unlink(folder / name)
        # The lock last: a folder without one is never swept.
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)
            os.rmdir(folder)
    with contextlib.suppress(OSError):
        os.close(lock)


def _sweep(home: Path) -> None:
    """Remove the folders of processes of this machine that are no more."""
    for folder in home.glob(f"{_PREFIX}????????"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:  # another user's, or none of ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.read(lock, 1000) == _mark()
        except OSError:  # in use
            ours = False
        if ours:
            _remove(folder, lock, os.getpid())
        else:
            os.close(lock)


def _mark() -> bytes:
    """What a lock says: a file system may keep locks of another machine from this one."""
    return f"memopt scratch folder of {platform.node()}\n".encode()
