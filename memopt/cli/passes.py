"""``memopt passes``: what exists."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

EXAMPLES = """\
examples:
  memopt passes
      every pass, exact or not, and what it needs
  memopt passes checkpoint
      one pass with its options
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "passes",
        help="list the passes",
        description="List the passes: what each does, whether it is exact, what it needs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="show one pass with its options")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from rich.console import Console
    from rich.padding import Padding

    from memopt.errors import UnknownPass
    from memopt.registry import available_passes, exactness

    known = available_passes()
    console = Console()
    if options.name is not None:
        if options.name not in known:
            raise UnknownPass(f"unknown pass {options.name!r}. There are: {', '.join(known)}.")
        cls = known[options.name]
        console.print(f"{cls.name}: {(cls.__doc__ or '').strip()}", highlight=False)
        for field in dataclasses.fields(cls):
            console.print(f"  {field.name}: {field.type} = {field.default!r}", highlight=False, markup=False)
        return
    for name, cls in known.items():
        console.print(f"[bold]{name}[/]  {exactness(cls)}", highlight=False)
        console.print(Padding((cls.__doc__ or "").strip().replace("``", ""), (0, 0, 0, 4)))
        if cls.changes:
            console.print(Padding(f"changes: {cls.changes}", (0, 0, 0, 4)))
        console.print(Padding(f"used in: {', '.join(sorted(cls.modes, reverse=True))}", (0, 0, 0, 4)))
        console.print(Padding(f"needs: {cls.needs}", (0, 0, 0, 4)))
