"""Build a configuration dataclass from plain values, as TOML files and the command line give them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from memopt.errors import InputError

T = TypeVar("T")


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; another type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)


def build(cls: type[T], values: Mapping[str, Any], *, what: str, base: T | None = None) -> T:
    """An instance of the dataclass ``cls`` with ``values`` checked against its annotations and converted to them.

    Args:
        cls: a dataclass; strings are converted to its field types ("1e-4" to a float, "1,2,4" to a tuple of ints).
        values: option name to value.
        what: how to call the thing in error messages, such as "pass 'amp'".
        base: where the other fields come from, instead of the defaults.

    Raises:
        InputError: an option that does not exist, or a value of the wrong kind; names the option and what it takes.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{what}: options are given as a table of names and values, not as {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    given = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{what} has no option {name!r}.{hint} Options: {', '.join(fields) or 'none'}.")
        choices = _members(hints[name])
        if isinstance(value, str) and value.lower() == "none" and type(None) in choices:
            value = None
        elif isinstance(value, str) and str not in choices and any(map(_is_list, choices)):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        given[name] = value
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        # A check in __post_init__ speaks for itself; pydantic puts its own words before it.
        text = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{what}: {where}: {text} (given: {first['input']!r})" if where else f"{what}: {text}"
        ) from None
