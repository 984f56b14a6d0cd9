"""``memopt max-batch``: the largest batch that fits a budget."""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import TYPE_CHECKING, Any

from memopt import files
from memopt.cli import inputs, subject
from memopt.cli.options import check_outputs, path
from memopt.errors import DoesNotFit, MemoptError

if TYPE_CHECKING:
    from memopt.memory.fit import BatchFit
    from memopt.memory.report import MemoryReport

_NOT_HERE = re.compile(
    r"(Profile it on|If the model runs with these inputs, profile) true tensors: real=True, or --real"
)
_INSTEAD = "max-batch works on fake tensors alone; profile single batch sizes on true ones with memopt profile --real"
SCHEMA = 1
"""Version of the JSON form."""

EXAMPLES = """\
examples:
  memopt max-batch examples/hae_v2 --preset brats128 --budget 24GiB --device cuda
      the largest batch of the recipe whose training step fits 24 GiB
  memopt max-batch examples/hae_v2 --preset brats128 --budget 24GiB --device cuda --passes checkpoint
      the same with checkpointing
  memopt max-batch my.nets:UNet --budget 8GiB --input sample=Bx4x64x64 --input timestep=B:int64
      a class in ./my/nets.py; B stands for the batch size
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "max-batch",
        help="find the largest batch that fits a budget",
        description="Find the largest batch whose step fits a budget, from profiles on fake tensors. What is found "
        "fits, one sample more does not. The budget is for tensors: on a GPU leave room for CUDA itself, for the "
        "workspaces of its kernels and for what the allocator cannot use.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject.add(parser, "passes")
    parser.add_argument("--budget", metavar="SIZE", required=True, help="such as 24GiB or 500MB")
    parser.add_argument("--json", metavar="FILE", type=path, help="write the answer as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from memopt.memory.fit import max_batch
    from memopt.units import parse_bytes

    check_outputs(options, "json")
    began = time.perf_counter()
    budget = parse_bytes(options.budget, "--budget")
    seen: dict[int, MemoryReport] = {}
    with subject.working(f"loading {options.target}") as say:
        about = subject.of(options)
        if options.input:
            inputs.check_scales(options.input)

        def profile_at(batch: int) -> MemoryReport:
            say(f"batch {batch} (profiled so far: {len(seen)})")
            seen[batch] = about.profile(batch)
            return seen[batch]

        try:
            fit = max_batch(profile_at, budget)
        except DoesNotFit as error:
            batch, report = next(iter(seen.items()))
            say("looking for passes that help")
            raise DoesNotFit(f"{error}. {_help(about, batch, report, budget)}") from None
        except MemoptError as error:
            raise type(error)(_NOT_HERE.sub(_INSTEAD, str(error))) from error
    _show(fit, seen[fit.batch], time.perf_counter() - began)
    if options.json is not None:
        _write(options.json, fit, seen[fit.batch])
        print(f"wrote {options.json}")


def _help(about: subject.Subject, batch: int, report: MemoryReport, budget: int) -> str:
    """Which passes would lower the peak of the smallest batch, by profiles with each."""
    from memopt.registry import available_passes
    from memopt.units import format_bytes

    used = {text.partition("(")[0] for text in report.passes}
    mode = "train" if about.train else "infer"
    found = []
    for name, cls in available_passes().items():
        if name not in used and mode in cls.modes:
            try:
                peak = about.profile(batch, [name]).peak
            except MemoptError:  # finds nothing to do here, or does not go with the others
                continue
            if peak < report.peak:
                found.append((peak, f"{name}: {format_bytes(peak)}" + (" (fits)" if peak <= budget else "")))
    if not found:
        return "No other pass lowers that: give a larger budget or make the model smaller."
    return f"With --passes it needs less: {', '.join(text for _, text in sorted(found))}."


def _show(fit: BatchFit, report: MemoryReport, seconds: float) -> None:
    from rich.console import Console

    from memopt.memory.show import kind
    from memopt.units import format_bytes

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    console = Console()
    passes = ", ".join(report.passes) or "none"
    say(f"{report.model}: {kind(report)}, budget {format_bytes(fit.budget)}; passes: {passes}")
    console.print(f"\n[bold]Largest batch: {fit.batch}[/]\n", highlight=False)
    say(f"  batch {fit.batch}: peak {format_bytes(fit.peak)}, {fit.share:.1%} of the budget")
    if fit.failed is not None:
        say(f"  batch {fit.batch + 1} cannot be profiled, and so ended the search: {fit.failed}")
    elif fit.beyond is None:
        say("  larger batches were not tried")
    else:
        say(f"  batch {fit.batch + 1}: peak {format_bytes(fit.beyond)}, {fit.beyond / fit.budget:.1%} of the budget")
    say(f"  from profiles of {len(fit.points)} batch sizes on fake tensors in {seconds:.0f} s")


def _write(file: Any, fit: BatchFit, report: MemoryReport) -> None:
    about = {"model": report.model, "train": report.train, "device": report.device, "passes": report.passes}
    files.write(file, json.dumps({"schema": SCHEMA, **about, **fit.to_dict()}))
