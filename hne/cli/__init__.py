"""The command ``hne``: train, study, distill, eval, anytime, bench, info, export."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from ..distributed import is_main_process
from ..errors import HNEError
from . import anytime, bench, distill, evaluate, export, info, study, train

_COMMANDS = (train, study, distill, evaluate, anytime, bench, info, export)

_DESCRIPTION = """\
Hierarchical neural ensembles: N networks in one tree, evaluated one after the other, so that an
answer is ready after each of them, and every further one makes it better.
"""
_EPILOG = """\
start here:
  hne train                                         a small ensemble on scikit-learn's digits
  hne eval runs/digits-hne_tiny                     accuracy and cost of the first 1, 2, 4, ... N networks
  hne anytime runs/digits-hne_tiny --deadline-ms 2  the best answers that are ready after 2 ms
  hne study table1                                  what to train an ensemble for: the paper's Table 1, on digits

`hne COMMAND --help` explains each command. A folder written by `hne train` stands for its checkpoint.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 for an error that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.run(args)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (HNEError, ValueError, TypeError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        hint = "" if isinstance(error, HNEError) else " (--debug shows where)"
        _say(f"error: {' '.join(str(error).split())}{hint}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hne",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    if is_main_process():
        print(f"hne: {text}", file=sys.stderr)
