"""What a model is called with, as the command line says it: ``sample=Bx4x64x64``, ``timestep=B:int64``, ``scale=0.5``.

A tensor is its shape, sizes joined by ``x``, and after a colon its type (float32 if left out). ``B`` stands for the
batch size. A shape of one number needs the type, because a number alone is a number, as is True, None or a 'text'.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from memopt.errors import InputError
from memopt.estimate import check_size

FORMS = "NAME=SHAPE, NAME=SHAPE:DTYPE or NAME=VALUE, such as sample=2x4x64x64, timestep=2:int64, return_dict=False"
_NAMED = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)
_SIZE = re.compile(r"\d+|B")


@dataclass(frozen=True)
class Input:
    """One argument of a model."""

    name: str | None
    """None: by its position."""
    shape: tuple[int | str, ...] | None
    """Sizes, or ``"B"``; None: it is no tensor."""
    dtype: torch.dtype = torch.float32
    value: Any = None
    """If it is no tensor."""

    @property
    def scales(self) -> bool:
        """Whether it depends on the batch size."""
        return self.shape is not None and "B" in self.shape

    def make(self, batch: int, device: str) -> Any:
        """The argument for a batch size. Tensors are zeros: safe as indices, too."""
        if self.shape is None:
            return self.value
        sizes = [batch if isinstance(size, str) else size for size in self.shape]
        check_size(sizes, "--input")
        try:
            return torch.zeros(sizes, dtype=self.dtype, device=device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            raise InputError(f"--input: a tensor of {'x'.join(map(str, sizes))} cannot be made: {told}") from error


def parse(text: str) -> Input:
    """One argument from its text.

    Raises:
        InputError: it is neither a shape nor a plain value.
    """
    named = _NAMED.fullmatch(text.strip())
    name, value = named.groups() if named else (None, text.strip())
    shape, colon, dtype = value.partition(":")
    if any(s.isdecimal() and len(s) > 16 for s in shape.split("x")) and (colon or "x" in shape):
        raise InputError(f"--input {text!r}: a size is too large")
    sizes = ["B" if s == "B" else int(s) for s in shape.split("x") if _SIZE.fullmatch(s)]
    if len(sizes) == shape.count("x") + 1 and (colon or len(sizes) > 1 or sizes == ["B"]):
        if 0 in sizes:
            raise InputError(f"--input {text!r}: every size must be at least 1")
        return Input(name, tuple(sizes), _dtype(dtype, text) if colon else torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what looks like a number and a name
            literal = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        literal = ...
    if not isinstance(literal, (bool, int, float, str, type(None))):
        quotes = f" A text needs quotes: {name}=\"'{value}'\"." if name and value.isidentifier() else ""
        raise InputError(f"--input {text!r} is none of the forms {FORMS}.{quotes}")
    return Input(name, None, value=literal)


def arguments(texts: list[str], batch: int | None, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, their tensors on a device.

    Raises:
        InputError: a malformed one, one given twice, none at all, or a ``B`` without a batch size.
    """
    if not texts:
        raise InputError(f"say what the model is called with: --input {FORMS}")
    inputs = [parse(text) for text in texts]
    names = [one.name for one in inputs if one.name is not None]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--input: {', '.join(sorted(twice))} is given twice")
    if batch is None and any(one.scales for one in inputs):
        raise InputError("--input has a B, which stands for the batch size: give --batch-size, or a number for B")
    made = [(one.name, one.make(batch or 1, device)) for one in inputs]
    return tuple(v for name, v in made if name is None), {name: v for name, v in made if name is not None}


def check_scales(texts: list[str]) -> None:
    """Raises InputError if no input depends on the batch size."""
    if not any(parse(text).scales for text in texts):
        raise InputError("no --input depends on the batch size: write B for it, as in sample=Bx4x64x64")


def _dtype(name: str, text: str) -> torch.dtype:
    known = {n: value for n, value in vars(torch).items() if isinstance(value, torch.dtype)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"--input {text!r}: torch has no dtype {name!r}.{hint} Such as float32, bfloat16, int64, bool."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental
            torch.zeros(1, dtype=known[name])
    except RuntimeError:
        raise InputError(f"--input {text!r}: torch makes no plain tensors of dtype {name!r}") from None
    return known[name]
