"""Options that several verbs share: which recipe, which preset, which settings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from memopt import files
from memopt.errors import InputError

SETTINGS = {
    "steps": ("N", "optimizer steps in all"),
    "batch_size": ("B", "samples per step, over all processes"),
    "microbatch": ("M", "samples per forward, accumulated to the batch"),
    "passes": ("A,B", "memopt passes, such as checkpoint,amp:dtype=fp16"),
    "budget": ("SIZE", "plan further passes that keep a step within so many bytes, such as 8GiB"),
    "allow": ("A,B", "passes that are not exact and may be planned: amp, optimizer_8bit"),
    "seed": ("S", "determines everything random"),
}
"""Settings of every recipe that have an option of their own."""


def add_preset(parser: argparse._ActionsContainer) -> None:
    """Add what chooses among the recipe's configurations."""
    parser.add_argument("--preset", metavar="P", help="configuration by name (default: the recipe's first)")


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add where the recipe's data comes from."""
    parser.add_argument("--data", metavar="PATH", type=path, help="your data, in the form the recipe reads")
    parser.add_argument("--cache", metavar="DIR", type=path, default=Path("data"), help="prepared data (default: data)")


def add_settings(parser: argparse._ActionsContainer, *names: str, others: bool = True) -> None:
    """Add some of ``SETTINGS``, and ``--set`` for all others."""
    for name in names:
        metavar, text = SETTINGS[name]
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    if others:
        parser.add_argument(
            "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="any other setting of the recipe"
        )


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The settings that were given, by name."""
    given: dict[str, Any] = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    if "passes" in given:
        given["passes"] = pass_names(given["passes"])
    return given | dict(_pair(text) for text in options.set)


def pass_names(text: str) -> tuple[str, ...]:
    """The passes of ``--passes``; an empty text means none."""
    names = tuple(part.strip() for part in text.split(",")) if text.strip() else ()
    if "" in names:
        raise InputError(f"--passes {text!r} has no name at one side of a comma; separate names as in checkpoint,amp")
    return names


def check_outputs(options: argparse.Namespace, *names: str) -> None:
    """Raises InputError if a file of these options cannot be written, or is there twice: known before the work."""
    given = {f"--{name}": file for name in names if (file := getattr(options, name)) is not None}
    for file in given.values():
        files.check(file)
    options_of: dict[Path, str] = {}
    for name, file in given.items():
        if (other := options_of.setdefault(file.resolve(), name)) != name:
            raise InputError(f"{other} and {name} name the same file, {file}")


def path(text: str) -> Path:
    """A path from the command line."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.expanduser(text))  # unlike Path's, it cannot fail


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes key=value, not {text!r}")
    return key, value
