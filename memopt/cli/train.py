"""``memopt train DIR``: train the recipe in a folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from memopt.errors import InputError

EXAMPLES = """\
examples:
  memopt train examples/hae_v2
      the default preset on simulated patients, into runs/hae_v2-quickstart
  memopt train examples/hae_v2 --preset brats128 --data /data/BraTS2021 --out runs/brats --passes checkpoint,amp
      the full model on real data, with two passes
  memopt train examples/hae_v2 --out runs/brats --data /data/BraTS2021 --resume
      go on from the newest whole checkpoint, with the settings of that run
  memopt train examples/hae_v2 --batch-size 28 --microbatch 7 --set lr=3e-4 dropout=0.2
      four microbatches per step, and two settings of the recipe
  torchrun --nproc_per_node 2 -m memopt.cli train examples/hae_v2
      two processes; on a machine without GPUs they talk through gloo
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "train",
        help="train the recipe in a folder",
        description="Train the recipe in a folder; leave a run folder with weights, metrics, pictures and checkpoints.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="DIR", type=Path, help="a folder with a recipe.py that defines recipe()")
    parser.add_argument("--preset", metavar="P", help="configuration by name (default: the recipe's first)")
    parser.add_argument("--data", metavar="PATH", type=Path, help="your data, in the form the recipe reads")
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path("data"), help="prepared data (default: data)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/RECIPE-PRESET)")
    parser.add_argument("--steps", metavar="N", help="optimizer steps in all")
    parser.add_argument("--batch-size", metavar="B", help="samples per step, over all processes")
    parser.add_argument("--microbatch", metavar="M", help="samples per forward; the step's result stays the same")
    parser.add_argument("--passes", metavar="A,B", help="memopt passes, such as checkpoint,amp:dtype=fp16")
    parser.add_argument("--seed", metavar="S", help="determines everything random")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="any other setting of the recipe"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in the run folder"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from memopt.recipe import configure, load_recipe
    from memopt.training import train

    recipe = load_recipe(options.recipe)
    values = {
        name: value
        for name in ("steps", "batch_size", "microbatch", "passes", "seed")
        if (value := getattr(options, name)) is not None
    }
    values |= dict(_pair(text) for text in options.set)
    out = options.out or Path("runs") / f"{recipe.name}-{options.preset or next(iter(recipe.presets))}"
    base = _stored(out, recipe) if options.resume else None
    config = configure(recipe, options.preset, values, base)
    train(recipe, config, out=out, data=options.data, cache=options.cache, resume=options.resume)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes key=value, not {text!r}")
    return key, value


def _stored(out: Path, recipe: Any) -> Any:
    """The configuration of the run in ``out``, or None if there is none yet."""
    from memopt.config import build

    file = out / "config.json"
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
        name, values = stored["recipe"], stored["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); give the run's settings again with another --out") from None
    if name != recipe.name:
        raise InputError(f"{out} is a run of recipe {name!r}, not of {recipe.name!r}")
    kind = type(next(iter(recipe.presets.values())))
    known = {field.name for field in dataclasses.fields(kind)}
    return build(kind, {k: v for k, v in values.items() if k in known}, what=str(file))
