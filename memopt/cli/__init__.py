"""The command line: ``memopt VERB``, one small file per verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from memopt.cli import max_batch, passes, profile, train
from memopt.errors import MemoptError

VERBS = (train, profile, max_batch, passes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after an error in what the user gave, whose message is on stderr."""
    import memopt

    parser = argparse.ArgumentParser(prog="memopt", description="Make PyTorch models fit.")
    parser.add_argument("--version", action="version", version=f"memopt {memopt.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MemoptError as error:
        print(f"memopt {options.verb}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"memopt {options.verb}: error: the Python package {error.name!r} is needed and not installed. The example "
            "recipes have extras, such as pip install 'memopt[hae]'.",
            file=sys.stderr,
        )
        return 2
    except PermissionError as error:
        print(f"memopt {options.verb}: error: cannot access {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"memopt {options.verb}: interrupted", file=sys.stderr)
        return 130
    return 0
