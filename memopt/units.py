"""Bytes as people write them: ``"8GiB"`` to 8589934592 and back."""

from __future__ import annotations

import math
import re

from memopt.errors import InputError

_UNITS = {"": 1, "B": 1} | {f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_BY_LOWER = {unit.lower(): size for unit, size in _UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | float | str, what: str = "size") -> int:
    """Bytes from a number of bytes or a text such as ``"8GiB"``, ``"500 MB"``, ``"1.5GiB"``.

    Raises:
        InputError: not a size, not positive, or with a unit that does not exist.
    """
    expected = f"{what} is a number of bytes or a text such as '8GiB' or '500MB'"
    if isinstance(size, bool) or not isinstance(size, (int, float, str)):
        raise InputError(f"{expected}, not {size!r}")
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise InputError(f"{expected}, not {size!r}")
        number, unit = match.groups()
        if unit.lower() not in _BY_LOWER:
            raise InputError(f"{expected}; there is no unit {unit!r} in {size!r} (units: {', '.join(_UNITS)[2:]})")
        value = float(number) * _BY_LOWER[unit.lower()]
    else:
        value = float(size)
    if not (math.isfinite(value) and value >= 1):
        raise InputError(f"{what} must be at least one byte, not {size!r}")
    return int(value)


def format_bytes(size: int) -> str:
    """``1610612736`` as ``"1.50 GiB"``; sizes below 1 KiB as ``"512 B"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.2f} {unit}"
    return f"{size} B"
