"""The command line: ``memopt VERB``, one small file per verb."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from memopt.cli import ablate, max_batch, passes, plan, profile, run, train
from memopt.errors import MemoptError

VERBS = (train, run, profile, plan, max_batch, ablate, passes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after an error in what the user gave, whose message is on stderr."""
    import memopt

    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show becomes a question mark
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="memopt", description="Make PyTorch models fit.")
    parser.add_argument("--version", action="version", version=f"memopt {memopt.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options.run(options)
    except MemoptError as error:
        print(f"memopt {options.verb}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        folder = getattr(options, "recipe", None) or getattr(options, "target", None)
        extras = " The recipes in memopt's examples have extras, such as pip install 'memopt[hae]'."
        print(
            f"memopt {options.verb}: error: the Python package {error.name!r} is needed and not installed."
            f"{extras if folder and Path(folder).is_dir() else ''}",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"memopt {options.verb}: error: cannot access {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"memopt {options.verb}: interrupted", file=sys.stderr)
        return 130
    return 0
