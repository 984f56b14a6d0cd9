"""Writing for the user: a file whole or not at all, nothing but a file replaced; a folder by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from memopt.errors import InputError


def check(file: Path) -> Path:
    """The file that would be written, links followed.

    Raises:
        InputError: it is a folder, or a device and the like, or its folder is missing or read-only.
    """
    try:
        target = file.resolve()
    except RuntimeError:
        raise InputError(f"cannot write {file}: {os.strerror(errno.ELOOP)}") from None
    code = 0
    if target.is_dir():
        code = errno.EISDIR
    elif target.exists() and not target.is_file():
        raise InputError(f"cannot write {file}: it is not a regular file")
    elif not target.parent.is_dir():
        code = errno.ENOTDIR if target.parent.exists() else errno.ENOENT
    elif not os.access(target.parent, os.W_OK):
        code = errno.EACCES
    if code:
        raise InputError(f"cannot write {file}: {os.strerror(code)}")
    return target


def write(file: Path, data: str | bytes) -> None:
    """Write a text (as UTF-8) or bytes beside the target, which they replace if all goes well.

    Raises:
        InputError: the file cannot be written; what was there before is untouched.
    """
    target = check(file)
    partial = target.with_name(f".partial-{target.name}")
    try:
        partial.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
        partial.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a folder: the lock goes with the process, however it ends, and its children do not inherit it.

    Raises:
        InputError: another process holds it.
    """
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another run is writing into {folder}: wait for it, or choose another --out") from None
        yield
