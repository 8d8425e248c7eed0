"""The command ``hne``: train, study, compare, distill, eval, calibrate, quantize, anytime, bench, info, export."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from ..distributed import is_main_process
from . import anytime, bench, calibrate, compare, distill, evaluate, export, info, quantize, study, train
from .console import Terminated, cleaning_up_on_signals, discard_output, explain, usable_streams

__all__ = ["main"]

_COMMANDS = (train, study, compare, distill, evaluate, calibrate, quantize, anytime, bench, info, export)

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
    with usable_streams():
        try:
            args = _parser().parse_args(argv)
        except SystemExit:
            _flush()
            raise
        try:
            with cleaning_up_on_signals(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                code = args.execute(args)
                sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader of the output, for instance `head`, has ended
            discard_output()
            return 1
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except Terminated as signaled:
            _flush()
            os.kill(os.getpid(), signaled.number)  # its handler is the default one again
            return 128 + signaled.number
        except Exception as error:
            text = explain(error)
            if args.debug or text is None:
                raise
            _say(f"error: {text}")
            _flush()
            return 2


def _flush() -> None:
    """Write what is buffered, or drop it if the output cannot be written: Python would complain at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()


class _CommandList(argparse.RawDescriptionHelpFormatter):
    """Leaves room for the longest command; argparse forgets that commands are indented once more."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = 4 + max(len(command.__name__.rpartition(".")[2]) for command in _COMMANDS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hne",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_CommandList,
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
        with suppress(OSError):  # standard error may be closed
            print(f"hne: {text}", file=sys.stderr, flush=True)
