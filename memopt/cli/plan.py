"""``memopt plan``: passes that keep a step within a budget."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from memopt.cli import subject
from memopt.cli.options import check_outputs, path
from memopt.errors import InputError

if TYPE_CHECKING:
    from memopt.planning.planner import Search

EXAMPLES = """\
examples:
  memopt plan examples/hae_v2 --preset brats128 --batch-size 14 --device cuda --budget 8GiB
      passes with which a training step of the recipe fits; needs neither a GPU nor the data
  memopt plan examples/hae_v2 --budget 300MiB --out plan.toml
      the same for this machine, into a file that can be read, changed and applied
  memopt plan my.nets:UNet --input sample=8x4x64x64 --input timestep=8:int64 --budget 2GiB --allow amp,optimizer_8bit
      a class in ./my/nets.py; passes that are not exact may be used where exact ones do not suffice
  memopt plan examples/hae_v2 --pareto plan.png
      time against peak for a dozen budgets, beside checkpointing of every block, of every second, ...
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "plan",
        help="find passes that keep a step within a budget",
        description="Find the fastest passes with which a step fits a budget, from profiles on fake tensors. The "
        "budget is for tensors: on a GPU leave room for CUDA itself, for the workspaces of its kernels and for what "
        "the allocator cannot use. Times are estimates from the hardware's figures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject.add(parser, "batch_size", "passes")
    parser.add_argument("--budget", metavar="SIZE", help="such as 8GiB or 500MB")
    parser.add_argument("--allow", metavar="A,B", default="", help="passes that are not exact: amp, optimizer_8bit")
    parser.add_argument("--hardware", metavar="NAME", help="a100, h100, rtx3090, rtx4090, t4; default: this machine")
    parser.add_argument("--out", metavar="FILE", type=path, help="write the plan as TOML")
    parser.add_argument("--pareto", metavar="FILE", type=path, help="write time against peak for many budgets as PNG")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from memopt.units import format_bytes, parse_bytes

    check_outputs(options, "out", "pareto")
    if options.budget is None and options.pareto is None:
        raise InputError("give --budget SIZE for a plan, or --pareto FILE for a picture of many")
    if options.out is not None and options.budget is None:
        raise InputError("--out writes the plan of a budget: give --budget, too")
    budget = None if options.budget is None else parse_bytes(options.budget, "--budget")
    began = time.perf_counter()
    with subject.working(f"loading {options.target}") as say:
        search = search_of(subject.of(options), options.allow, options.hardware, say)
        plan = None if budget is None else search.plan(budget)
        found = None
        if options.pareto is not None:
            from memopt.planning.pareto import compare

            found = compare(search)
    if plan is not None:
        print(plan)
        print(f"from {search.profiles} profiles in {time.perf_counter() - began:.0f} s")
        if options.out is not None:
            plan.save(options.out)
            print(f"wrote {options.out}")
    if found is not None:
        from memopt.planning.pareto import draw

        for point in found:
            ratio = point.seconds / found[0].seconds
            print(f"{format_bytes(point.peak):>12}  {ratio:6.3f} of plain's time  {point.name}")
        draw(found, search, options.pareto)
        print(f"wrote {options.pareto}")


def search_of(about: subject.Subject, allow: str, hardware: str | None, say: Any) -> Search:
    """The search for plans of what the command line speaks of."""
    from memopt.cli.options import pass_names
    from memopt.hardware import hardware_for
    from memopt.planning.planner import Search

    return Search(
        about.work(device=about.device, real=False),
        train=about.train,
        device=about.device,
        hardware=hardware_for(hardware, about.device),
        allow=pass_names(allow) if allow else (),
        given=about.given,
        say=say,
    )
