"""``memopt profile``: where the bytes of one step go."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from memopt.cli import subject
from memopt.cli.options import check_outputs, path
from memopt.errors import MemoptError

EXAMPLES = """\
examples:
  memopt profile examples/hae_v2 --preset brats128 --batch-size 14 --device cuda
      a training step of the recipe as it would be on a GPU; needs neither one, nor the data
  memopt profile examples/hae_v2 --passes checkpoint --html profile.html --plot profile.png
      with a pass, and as a page and a picture
  memopt profile diffusers:UNet2DModel --input sample=4x3x64x64 --input timestep=10 --optimizer sgd
      a model of a library, called with a tensor and a number by name, its optimizer SGD
  memopt profile my.nets:UNet --input sample=2x4x64x64 --input timestep=2:int64 --infer --json profile.json
      a class in ./my/nets.py, called with two tensors by name, forward only
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "profile",
        help="show where the bytes of a step go",
        description="Show where the bytes of one training step (or one forward) go. It is computed on fake tensors, "
        "which need no memory, no data and no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject.add(parser, "batch_size", "passes")
    parser.add_argument("--real", action="store_true", help="run true steps on --device instead of fake ones")
    parser.add_argument("--json", metavar="FILE", type=path, help="write the whole report as JSON")
    parser.add_argument("--plot", metavar="FILE", type=path, help="write the timeline as a PNG")
    parser.add_argument("--html", metavar="FILE", type=path, help="write a page with everything in it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    import torch
    from rich.console import Console

    from memopt.memory.show import print_summary

    check_outputs(options, "json", "plot", "html")
    with subject.working(f"profiling {options.target}"):
        try:
            report = subject.of(options).profile()
        except torch.OutOfMemoryError as error:
            raise MemoptError(f"{error}\nThe true step does not fit this device: leave out --real.") from None
    print_summary(report, Console(width=None if sys.stdout.isatty() else 110))
    for file, write in (
        (options.json, report.save_json),
        (options.plot, report.plot),
        (options.html, report.save_html),
    ):
        if file is not None:
            write(file)
            print(f"wrote {file}")
