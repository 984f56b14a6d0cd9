"""``memopt passes``: what exists."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

EXAMPLES = """\
examples:
  memopt passes
      every pass, exact or not, and what it needs
  memopt passes checkpoint
      one pass with its options
  memopt passes --conflicts examples/hae_v2
      which of them cannot be put on this model together, as a table in Markdown
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("name", nargs="?", help="show one pass with its options")
    what.add_argument("--conflicts", metavar="DIR", help="show which passes meet on the model of a recipe folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    if options.conflicts is not None:
        print(_conflicts(options.conflicts))
        return
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


def _conflicts(folder: str) -> str:
    from memopt.conflicts import conflicts, markdown
    from memopt.estimate import fake_model
    from memopt.recipe import configure, load_recipe

    recipe = load_recipe(os.path.expanduser(folder))
    config = configure(recipe, None, {})
    model = fake_model(lambda: recipe.model(config))
    return markdown(conflicts(model, optimizer=recipe.optimizer(config, model)))
