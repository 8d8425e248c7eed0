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

__all__ = ["main"]

_COMMANDS = (train, study, distill, evaluate, anytime, bench, info, export)

_DESCRIPTION = """\
Hierarchical neural ensembles: N networks that share the trunk of a tree. They are evaluated one after
the other: an answer is ready after the first, and better answers follow.
"""
_EPILOG = """\
start here:
  hne train                                         a small ensemble on scikit-learn's digits
  hne eval runs/digits-hne_tiny                     accuracy and cost of the first 1, 2, 4, ... N members
  hne anytime runs/digits-hne_tiny --deadline-ms 2  the best answers that are ready after 2 ms
  hne study table1                                  the paper's Table 1 (accuracy by objective), on digits

`hne COMMAND --help` explains each command. A folder written by `hne train` stands for its checkpoint.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        The exit code: 0 for success, 2 for an error, 130 after an interruption, or a command's own code.
    """
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.execute(args)
    except BrokenPipeError:  # the reader of the output, for instance `head`, has ended
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
