"""``memopt ablate``: what each pass contributes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt import files
from memopt.cli import subject
from memopt.cli.options import pass_names, path
from memopt.errors import InputError

if TYPE_CHECKING:
    from memopt.ablation import Ablation, Progress, Row

SUFFIXES = (".md", ".csv", ".png")

EXAMPLES = """\
examples:
  memopt ablate examples/hae_v2 --out ablation
      every exact pass that applies; a folder with ablation.md, ablation.csv and ablation.png
  memopt ablate examples/hae_v2 --passes outer_product,checkpoint,amp:dtype=bf16 --out table.md --out picture.png
      these passes, one of them not exact
  memopt ablate examples/hae_v2 --preset brats128 --batch-size 14 --steps-batch 1
      memory of a batch of 14 on a GPU, which need not be there; times and errors of true steps with one sample
  memopt ablate my.nets:UNet --input sample=Bx4x64x64 --input timestep=B:int64 --batch-size 8 --no-time
      a class in ./my/nets.py, without times
"""


def add(verbs: Any) -> None:
    """Add this verb to the parser."""
    parser = verbs.add_parser(
        "ablate",
        help="show what each pass contributes",
        description="Measure a step without passes, with each pass alone, with all but each, and with all: peak memory "
        "by category, from profiles on fake tensors for CUDA; time, and errors of loss and gradients, from true steps "
        "on this machine. The passes of a recipe's preset count like any others: the first row has none.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subject.add(parser, "batch_size", "passes")
    parser.add_argument("--real", action="store_true", help="measure memory on true steps, too, on this machine")
    parser.add_argument("--steps-batch", metavar="B", help="samples of the true steps (default: the batch size)")
    parser.add_argument("--repeats", metavar="N", default="3", help="timed steps of each row (default: 3)")
    parser.add_argument("--no-time", action="store_true", help="measure no times")
    parser.add_argument("--no-errors", action="store_true", help="measure no errors")
    parser.add_argument(
        "--out",
        metavar="F",
        type=path,
        action="append",
        default=[],
        help="write a .md, .csv or .png file, or all three into a folder; can be given several times",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry it out."""
    from rich.console import Console

    from memopt import ablation, ablation_table
    from memopt.estimate import default_device
    from memopt.recipe import parse_passes
    from memopt.registry import resolve

    repeats = 0 if options.no_time else subject.positive("--repeats", options.repeats)
    steps_batch = None if options.steps_batch is None else subject.positive("--steps-batch", options.steps_batch)
    outputs = _outputs(options.out, repeats > 0)
    given = [p for table in parse_passes(pass_names(options.passes or "")) for p in resolve(table)]
    if options.passes is not None and not given:
        raise InputError("--passes names no pass; leave it out to ablate every exact pass that applies")
    # True steps run where they can; memory on true steps only where it was asked for.
    here = (options.device if options.real or options.device == "cpu" else None) or default_device()
    options.passes = ""  # the rows have them, and nothing else
    options.device = here if options.real else options.device or "cuda"
    with _progress() as progress:
        progress(f"loading {options.target}", 0, 1)
        about = subject.of(options)
        fakes = about.work(device=options.device, real=False)
        passes, left_out = (given, {}) if given else ablation.applicable(fakes, train=about.train)
        errors = not options.no_errors
        work = about.work(steps_batch, device=here, real=True) if repeats or errors else None
        settings = about.settings()
        batch = steps_batch or settings["batch_size"]
        on = here if batch is None else f"{here}, batch {batch}"
        rows = ablation.ablate(
            passes,
            lambda chosen: ablation.go_together(fakes, chosen),
            lambda chosen: about.profile(passes=chosen),
            work,
            train=about.train,
            seed=settings["seed"],
            errors=errors,
            repeats=repeats,
            progress=progress,
        )
    found = ablation.Ablation(
        tuple(rows),
        ablation.provenance(
            command=shlex.join(["memopt", *options.arguments]),
            subject=_subject(rows[0], options.target),
            steps=" and ".join([f"times, {repeats} rounds"] * (repeats > 0) + ["errors"] * errors) or "none",
            steps_on=on if repeats or errors else "",
            config=", ".join(f"{name}={value}" for name, value in settings.items() if name != "passes"),
        ),
        left_out,
    )
    ablation_table.print_table(found, Console(width=None if sys.stdout.isatty() else 150))
    for file in outputs:
        _write(found, file)
        print(f"wrote {file}")
        old = file.with_name("ablation.png")
        if not repeats and file.name == "ablation.csv" and old.exists():
            print(f"{old} is of an earlier run: there are no times to draw")


def _subject(plain: Row, target: str) -> str:
    from memopt.memory.show import kind, origin

    if plain.report is None:
        return target
    return f"{plain.report.model}, {kind(plain.report)}, {origin(plain.report)}; inputs: {plain.report.inputs}"


def _outputs(given: Sequence[Path], timed: bool) -> list[Path]:
    """The files to write, checked before the work."""
    found: list[Path] = []
    for out in given:
        if out.suffix in SUFFIXES and not out.is_dir():
            found.append(out)
        elif out.suffix and not out.is_dir():
            raise InputError(f"--out {out}: a file ends in {', '.join(SUFFIXES)}; a folder has no ending")
        else:
            if not out.is_dir():
                _check_folder(out)
            found += [out / f"ablation{suffix}" for suffix in SUFFIXES if timed or suffix != ".png"]
    for file in found:
        if file.suffix == ".png" and not timed:
            raise InputError(f"--out {file}: the picture shows memory against time; leave out --no-time")
        if file.parent.is_dir() or file.parent not in given:  # else it is made when there is something to write
            files.check(file)
    if twice := {str(f) for f in found if sum(f.resolve() == g.resolve() for g in found) > 1}:
        raise InputError(f"--out names {min(twice)} twice")
    return found


def _check_folder(folder: Path) -> None:
    """Raises InputError if it cannot be made."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir() or not os.access(there, os.W_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise InputError(f"--out {folder}: cannot make the folder: {os.strerror(code)}")


def _write(found: Ablation, file: Path) -> None:
    from memopt import ablation_table
    from memopt.plots import pareto

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {file.parent}: cannot make the folder: {error.strerror}") from None
    if file.suffix == ".png":
        pareto(found, file)
    else:
        files.write(file, ablation_table.markdown(found) if file.suffix == ".md" else ablation_table.as_csv(found))


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line on stderr whenever something else begins."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        last = ""

        def tell(text: str, done: int, of: int) -> None:
            nonlocal last
            bar.update(task, description=text, completed=done, total=of)
            stage = text.partition(": ")[0]
            if stage != last and not console.is_terminal:
                console.print(stage if of == 1 else f"{stage} ({of} rows)", highlight=False, markup=False)
            last = stage

        yield tell
