"""A folder of files that one process uses and nobody else: gone when it ends, however it ends.

The folder is ``memopt-<random>`` inside a given one, with a file ``memopt.lock`` that is locked for as long as the
process lives. Whoever makes a folder beside it removes those whose lock is free and names this machine: what killed
processes have left. A forked process leaves the folder alone.
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
