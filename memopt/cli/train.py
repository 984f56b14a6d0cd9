"""``memopt train DIR``: train the recipe in a folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from memopt.cli.options import add_data, add_preset, add_settings, path, settings

if TYPE_CHECKING:
    from memopt.recipe import Recipe, TrainConfig

OF_FREE = 0.9
"""Of a GPU's free memory: the rest is for its kernels' workspaces and for what the allocator cannot use."""
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
  memopt train examples/hae_v2 --preset brats128 --data /data/BraTS2021 --budget 8GiB --batch-size auto
      passes planned for a budget, and the largest batch that fits it
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
    parser.add_argument("recipe", metavar="DIR", type=path, help="a folder with a recipe.py that defines recipe()")
    add_preset(parser)
    add_data(parser)
    parser.add_argument("--out", metavar="DIR", type=path, help="run folder (default: runs/RECIPE-PRESET)")
    add_settings(parser, "steps", "batch_size", "microbatch", "passes", "budget", "allow", "seed")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest whole checkpoint in the run folder"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from memopt.recipe import configure, load_recipe, run_folder, stored
    from memopt.training import train

    recipe = load_recipe(options.recipe)
    out = options.out or run_folder(recipe, options.preset)
    base, data = stored(out, recipe) if options.resume else (None, None)
    given = settings(options)
    auto = given.get("batch_size") == "auto"
    if auto:
        del given["batch_size"]
    config = configure(recipe, options.preset, given, base)
    if auto:
        config = _largest_batch(recipe, config, options)
    train(recipe, config, out=out, data=options.data or data, cache=options.cache, resume=options.resume)


def _largest_batch(recipe: Recipe[Any], config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The configuration with the largest batch whose step fits the budget, or what the GPU has free."""
    import torch

    from memopt.cli import subject
    from memopt.errors import InputError
    from memopt.estimate import at_batch, default_device, profile_recipe
    from memopt.memory.fit import max_batch
    from memopt.units import format_bytes, parse_bytes

    device = default_device()
    if config.budget is not None:
        budget = parse_bytes(config.budget, "--budget")
    elif device == "cuda":
        budget = int(torch.cuda.mem_get_info()[0] * OF_FREE)
    else:
        raise InputError("--batch-size auto needs to know what a step may take: give --budget SIZE")
    with subject.working("looking for the largest batch"):
        fit = max_batch(
            lambda batch: profile_recipe(
                recipe, at_batch(config, batch), device=device, data=options.data, cache=options.cache
            ),
            budget,
        )
    print(f"batch size {fit.batch}: predicted peak {format_bytes(fit.peak)} of {format_bytes(budget)}")
    return at_batch(config, fit.batch)
