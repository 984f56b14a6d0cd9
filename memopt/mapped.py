"""Files in memory: tensors that are a part of a file, and reads of it that leave no pages behind.

A tensor over a mapped file takes no memory until it is looked at; the system brings its pages in and may drop them
again. That serves who looks at single weights. Who wants all of a part at once reads it (:meth:`MappedFile.fill`) into
memory of his own: pages that a mapping brings in count as the process's until the system needs them.

A file that this process made has no name, so nobody else can read, change or delete it, and it is gone when the process
is, however that ends. A file of the user's is mapped privately: what is written to its tensors never reaches it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memopt.errors import InputError, MemoptError

_FILES: weakref.WeakSet[MappedFile] = weakref.WeakSet()


class MappedFile(mmap.mmap):
    """A file of a fixed size in memory, which lives as long as a tensor over it.

    Made by :meth:`new` and :meth:`existing`.
    """

    name: str
    bytes: int
    private: bool
    """Whether what is written to its tensors never reaches it."""
    _descriptor: int
    _changed: int
    _address: int

    @classmethod
    def _of(cls, name: str, descriptor: int, *, private: bool) -> MappedFile:
        try:
            state = os.fstat(descriptor)
            access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
            made = cls(descriptor, state.st_size, access=access)
        except BaseException:
            os.close(descriptor)
            raise
        made.name, made.bytes, made.private = name, state.st_size, private
        made._descriptor, made._changed = descriptor, state.st_mtime_ns
        weakref.finalize(made, os.close, descriptor)
        made._address = torch.frombuffer(made, dtype=torch.uint8).data_ptr()
        _FILES.add(made)
        return made

    @classmethod
    def new(cls, size: int, folder: str | Path | None = None) -> MappedFile:
        """A file without a name for so many bytes, all of them zero.

        Args:
            size: bytes, at least 1.
            folder: on which disk; by default where the system keeps temporary files.

        Raises:
            InputError: that cannot be written to.
            MemoptError: there is no room for it.
        """
        home = str(folder) if folder is not None else tempfile.gettempdir()
        try:
            with tempfile.TemporaryFile(dir=home, buffering=0) as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise InputError(f"cannot keep files in {home}: {error.strerror}") from None
        try:
            _allocate(descriptor, size)
        except OSError as error:
            os.close(descriptor)
            raise MemoptError(
                f"cannot keep {size:,} bytes in {home}: {error.strerror}. Choose another folder, or move less there."
            ) from None
        return cls._of(f"a file in {home}", descriptor, private=False)

    @classmethod
    def existing(cls, path: str | Path) -> MappedFile:
        """A file of the user's, which is never written to.

        Raises:
            InputError: it cannot be read, or is empty.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        try:
            return cls._of(str(path), descriptor, private=True)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot map {path} into memory: {error}") from None

    def tensor(self, dtype: torch.dtype, start: int, numel: int) -> Tensor:
        """The part of the file from byte ``start`` on as a flat tensor; writing to it writes to the part."""
        return torch.frombuffer(self, dtype=dtype, count=numel, offset=start)

    def fill(self, start: int, data: Any) -> None:
        """Fill a buffer with the part from byte ``start`` on, past the mapping.

        Raises:
            MemoptError: the file is not as it was when it was mapped.
        """
        self.check()
        view = memoryview(data).cast("B")
        read = 0
        while read < len(view):
            count = os.preadv(self._descriptor, [view[read:]], start + read)
            if not count:
                raise MemoptError(f"{self.name} ended before byte {start + len(view):,}")
            read += count

    def holds(self, tensor: Tensor, start: int) -> bool:
        """Whether a tensor is the part of the file from byte ``start`` on."""
        return tensor.data_ptr() == self._address + start

    def check(self) -> None:
        """Raise if a user's file is not as it was when it was mapped: looking at pages that are no more ends a process.

        Raises:
            MemoptError: it was changed.
        """
        state = os.fstat(self._descriptor)
        if self.private and (state.st_size, state.st_mtime_ns) != (self.bytes, self._changed):
            raise MemoptError(f"{self.name} was changed while weights in it were in use")

    def written(self, start: int, size: int) -> bool:
        """Whether somebody may have written to tensors over a part of the file, so that it is not what they hold."""
        if not self.private:
            return False  # then it is
        page = mmap.PAGESIZE
        first, last = (self._address + start) // page, (self._address + start + size - 1) // page
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as file:
                file.seek(8 * first)
                entries = file.read(8 * (last - first + 1))
        except OSError:
            return True
        pages = torch.frombuffer(bytearray(entries), dtype=torch.int64)
        # Bits of Linux' pagemap: 63, there; 62, swapped out; 61, still a page of the file.
        own = ((pages < 0) | ((pages >> 62) & 1 == 1)) & ((pages >> 61) & 1 == 0)
        return len(pages) < last - first + 1 or bool(own.any())

    def leave(self) -> None:
        """Let the system have the pages that were looked at; a private file's may have been written to, and stay."""
        if not self.private and hasattr(mmap, "MADV_DONTNEED"):
            self.madvise(mmap.MADV_DONTNEED)

    @staticmethod
    def of(tensor: Tensor) -> tuple[MappedFile, int] | None:
        """The file that a tensor is a part of, and the byte where it starts there."""
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, torch.nn.Parameter):
            return None
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # functorch's
            return None
        for file in list(_FILES):
            if file._address <= address < file._address + file.bytes:
                return file, address - file._address
        return None


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size and its room on disk: a mapping of a file without room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(min(size, 1 << 24))
    while size:
        size -= os.write(descriptor, zeros[:size])
