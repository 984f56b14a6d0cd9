"""``memopt run DIR TASK``: what else a recipe does with the weights it was trained to."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

from memopt.cli.options import add_data, add_preset, add_settings, pass_names, path, settings
from memopt.errors import InputError, blaming

if typing.TYPE_CHECKING:
    from memopt.recipe import Recipe
    from memopt.tasks import TaskConfig

EXAMPLES = """\
examples:
  memopt run examples/hae_v2
      the tasks of a recipe, with their options
  memopt run examples/hae_v2 translate
      with the weights of the default preset's run, runs/hae_v2-quickstart, into runs/hae_v2-quickstart/translate
  memopt run examples/hae_v2 translate --checkpoint runs/brats --data /data/BraTS2021 --batch-size 8 --passes amp
      with the weights and the settings of a run, on real data, with a pass
  memopt run examples/hae_v2 translate --checkpoint runs/brats/checkpoints/step_00005000 --out early
      with those of one checkpoint, into another folder
  torchrun --nproc_per_node 2 -m memopt.cli run examples/hae_v2 translate
      two processes
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "run",
        help="carry out a task of a recipe with trained weights",
        usage="memopt run [-h] DIR [TASK] [options]",
        description="Carry out one of a recipe's tasks with the weights of a run; without TASK, list the tasks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="DIR", type=path, help="a folder with a recipe.py that defines recipe()")
    rest = parser.add_argument(
        "rest", metavar="TASK", nargs=argparse.REMAINDER, help="a task and its options: memopt run DIR TASK --help"
    )
    rest.required = False  # as some versions of argparse do not know
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from memopt.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    if options.rest and not options.rest[0].startswith("-"):
        _run(recipe, options.recipe, *options.rest)
    else:
        _list(recipe, options.recipe, options.rest)


def _run(recipe: Recipe[Any], folder: Path, name: str, *arguments: str) -> None:
    from memopt.config import build
    from memopt.recipe import configure, run_folder, stored
    from memopt.tasks import run_of, run_task

    if name not in recipe.tasks:
        raise InputError(f"recipe {recipe.name} has no task {name!r}; tasks: {', '.join(recipe.tasks) or 'none'}")
    task = recipe.tasks[name]
    common = argparse.ArgumentParser(prog=f"memopt run {folder} {name}", add_help=False, allow_abbrev=False)
    add_preset(common)
    common.add_argument(
        "--checkpoint",
        metavar="PATH",
        type=path,
        help="a run folder, one of its checkpoints, or a .safetensors file (default: runs/RECIPE-PRESET)",
    )
    add_data(common)
    common.add_argument(
        "--out", metavar="DIR", type=path, help=f"output folder (default: {name} in the run folder of the weights)"
    )
    add_settings(common)
    # The task's options are known once it is known for which preset.
    preset = common.parse_known_args(arguments)[0].preset
    defaults = _defaults(recipe, name, configure(recipe, preset, {}))
    parser = argparse.ArgumentParser(prog=common.prog, parents=[common], description=task.summary, allow_abbrev=False)
    group = parser.add_argument_group(f"options of {name}")
    for flag, metavar, default, text in _described(defaults):
        try:
            group.add_argument(
                flag, metavar=metavar, dest=_dest(flag), help=f"{text} (default: {default})".replace("%", "%%")
            )
        except argparse.ArgumentError:
            raise InputError(f"task {name}: {flag} is an option of every task; give the field another name") from None
    given = parser.parse_args(arguments)

    checkpoint = given.checkpoint or run_folder(recipe, preset)
    run = run_of(checkpoint)
    base, data = (None, None) if run is None else stored(run, recipe)
    if given.checkpoint is None and base is not None:
        preset = None  # it said which run is meant, and that run knows its settings
    config = configure(recipe, preset, settings(given), base)
    values: dict[str, Any] = {
        field.name: value
        for field in _fields(defaults)
        if (value := getattr(given, _dest(f"--{field.name.replace('_', '-')}"))) is not None
    }
    if "passes" in values:
        values["passes"] = pass_names(values["passes"])
    own = _defaults(recipe, name, config)
    run_task(
        recipe,
        task,
        config,
        build(type(own), values, what=f"task {name}", base=own),
        checkpoint=checkpoint,
        out=given.out,
        data=given.data or data,
        cache=given.cache,
    )


def _list(recipe: Recipe[Any], folder: Path, arguments: list[str]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from memopt.recipe import configure

    parser = argparse.ArgumentParser(
        prog=f"memopt run {folder}",
        usage=f"memopt run {folder} [TASK] [options]",
        description=f"List the tasks of recipe {recipe.name} ({', '.join(recipe.tasks) or 'it has none'}).",
        allow_abbrev=False,
    )
    add_preset(parser)
    config = configure(recipe, parser.parse_args(arguments).preset, {})
    console = Console()
    if not recipe.tasks:
        console.print(f"recipe {recipe.name} has no tasks", highlight=False, markup=False)
    for name, task in recipe.tasks.items():
        console.print(Text.assemble((name, "bold"), "  ", task.summary))
        table = Table("option", "default", "", box=None, padding=(0, 2, 0, 0), header_style="italic")
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.overflow = "fold"
        for flag, metavar, default, text in _described(_defaults(recipe, name, config)):
            table.add_row(*map(Text, (f"{flag} {metavar}", default, text)))
        console.print(Padding(table, (0, 0, 1, 2)))


def _defaults(recipe: Recipe[Any], name: str, config: Any) -> TaskConfig:
    from memopt.tasks import TaskConfig

    with blaming(f"task {name}: options(...) failed"):
        made = recipe.tasks[name].options(config)
    if not isinstance(made, TaskConfig):
        raise InputError(f"task {name}: options(...) returned a {type(made).__name__}, not a memopt.TaskConfig")
    return made


def _fields(defaults: TaskConfig) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(defaults) if field.init]


def _dest(flag: str) -> str:
    return f"task {flag}"  # apart from the settings of the recipe


def _described(defaults: TaskConfig) -> list[tuple[str, str, str, str]]:
    """The options of a task: flag, what it takes, default as the user would write it, meaning."""
    hints = typing.get_type_hints(type(defaults))
    docs = _docs(type(defaults))
    return [
        (
            f"--{field.name.replace('_', '-')}",
            _takes(field.name, hints[field.name]),
            _written(getattr(defaults, field.name)),
            docs.get(field.name, ""),
        )
        for field in _fields(defaults)
    ]


def _takes(name: str, kind: Any) -> str:
    if kind is bool:
        return "true|false"
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return "A,B" if typing.get_origin(kind) in (tuple, list) else name.rpartition("_")[2].upper()


def _written(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_written, value)) or '""'
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _docs(cls: type) -> dict[str, str]:
    """The strings under the fields of a dataclass and its bases; none where there is no source."""
    found = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        with contextlib.suppress(OSError, TypeError):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for field, below in zip(tree.body, tree.body[1:], strict=False):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = " ".join(text.replace("``", "").split()).removesuffix(".")
    return found
