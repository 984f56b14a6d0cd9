"""The errors memopt raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


class MemoptError(Exception):
    """Base of them all. The command line prints its message and exits with code 2."""


class InputError(MemoptError, ValueError):
    """Bad input: an argument, an option, a file."""


class UnknownPass(InputError):
    """No pass of that name exists."""


class DoesNotFit(MemoptError):
    """Not even the smallest batch fits a budget."""


class NothingToDo(MemoptError):
    """A pass found nothing to change in this model."""


class PassConflict(MemoptError):
    """Two passes would change the same thing."""


class AlreadyApplied(PassConflict):
    """The same pass, with the same options, is active already."""


@contextlib.contextmanager
def blaming(what: str, advice: str = "") -> Iterator[None]:
    """Code of the user runs inside: what it raises becomes an InputError, ``what`` first, with the line it comes from.

    Errors of memopt's own pass, and so does that of a missing package, of which the command line speaks.
    """
    try:
        yield
    except (MemoptError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_told(error)}{advice}") from error


def _told(error: BaseException) -> str:
    """An error with the innermost line that is neither torch's nor ours, if there is one."""
    name = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{name}: {error.msg} ({error.filename}:{error.lineno})"
    torch = sys.modules.get("torch")
    ours = [Path(file).parent for file in (__file__, getattr(torch, "__file__", None)) if file]
    inside = ("<frozen", *(f"{folder}{os.sep}" for folder in ours))
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside)]
    return f"{name}: {error}" + (f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else "")
