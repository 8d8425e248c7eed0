"""Options that several commands share, and argument types."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hne_kernels import BACKENDS, use_backend

from ..averages import AVERAGES
from ..data import DATASETS
from ..losses import OBJECTIVES

Subparsers = Any  # argparse has no public name for it


def new_parser(
    commands: Subparsers, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """The parser of a command, with the options that every command has."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_quiet(parser: Any) -> None:
    """Add ``--quiet``, for commands that show progress."""
    parser.add_argument("--quiet", action="store_true", help="print only the final table")


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Add the options for device, backend and threads."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to compute on; auto takes a GPU if there is one (default: auto)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="kernels to use, like HNE_BACKEND (default: the fastest usable ones; see `hne info`)",
    )
    group.add_argument("--threads", type=threads, metavar="K", help="CPU threads (default: PyTorch's choice)")


def add_run(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Add the options for the folder of a training run and for resuming it.

    Args:
        parser: The parser of the command.
        out: Default folder, for the help.
    """
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=path, metavar="DIR", help=f"folder of the run (default: {out})")
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out with the options it was started with, to the same result as without the "
        "interruption; start it if it has no checkpoint yet",
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument(
        "--eval-every",
        type=positive_int,
        metavar="K",
        help="evaluate every K epochs and at the end (default: about ten times)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive_int,
        metavar="K",
        default=1,
        help="save every K epochs and at the end (default: 1)",
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="also write scalars for TensorBoard into tensorboard/ of the run"
    )
    add_quiet(group)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a checkpoint."""
    parser.add_argument(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="a checkpoint of `hne train`, or the folder that holds it",
    )


def add_data(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the options for the data set.

    Args:
        parser: The parser of the command.
        default: Default data set, for the help.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", choices=tuple(DATASETS), default=argparse.SUPPRESS, help=f"the data set (default: {default})"
    )
    group.add_argument(
        "--data-dir",
        type=path_text,
        metavar="DIR",
        help="folder of its files (default: $HNE_DATA, then the folders of system packages)",
    )
    group.add_argument(
        "--limit-test",
        type=positive_int,
        metavar="K",
        default=argparse.SUPPRESS,
        help="test on only K images, for a quick check",
    )


def add_evaluation(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add the options of commands that evaluate a checkpoint on test data.

    Args:
        parser: The parser of the command.
        batch_size: Default batch size.
    """
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="K",
        default=batch_size,
        help=f"images per batch (default: {batch_size})",
    )
    add_quiet(parser)
    add_data(parser, default="the checkpoint's")
    add_computing(parser)


def add_average(
    parser: Any, *, default: str | None = "logits", by_default: str = "logits, as in the HNE paper"
) -> None:
    """Add ``--average``.

    Args:
        parser: The parser of the command.
        default: Default average.
        by_default: What that means, for the help.
    """
    parser.add_argument(
        "--average",
        choices=tuple(AVERAGES),
        default=default,
        help=f"what an ensemble averages over its members (default: {by_default})",
    )


@contextmanager
def computing(args: argparse.Namespace) -> Iterator[None]:
    """Apply ``--backend`` and ``--threads`` of :func:`add_computing`, and undo them at the end."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if args.backend is not None:
            stack.enter_context(use_backend(args.backend))
        if args.threads is not None:
            torch.set_num_threads(args.threads)
            stack.callback(torch.set_num_threads, threads)
        yield


# Argument types -------------------------------------------------------------------------------------------------------


def path(text: str) -> Path:
    """A path; ``~`` is the home folder, also in ``--out=~/runs``, which a shell does not expand."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(os.path.expanduser(text))


def path_text(text: str) -> str:
    """A path as text."""
    return str(path(text))


def positive_int(text: str) -> int:
    """A whole number above 0 and below 2^31."""
    if not text.isdecimal() or len(text) > 20 or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number from 0 to 2^31 - 1."""
    if not text.isdecimal() or len(text) > 20 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """A number of threads; more than these end the process, where the system refuses to start them."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if positive_int(text) > most:
        raise argparse.ArgumentTypeError(f"expected at most {most} threads on this machine, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Seconds, above 0 and up to an hour."""
    if positive_float(text) > 3600:
        raise argparse.ArgumentTypeError(f"expected at most 3600 seconds, got {text!r}")
    return float(text)


def positive_ints(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas."""
    return tuple(positive_int(number) for number in text.split(","))


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def distinct_floats(text: str) -> tuple[float, ...]:
    """Different finite numbers of at least 0, separated by commas."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < math.inf for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers with commas between them, got {text!r}")
    return values


def objectives(text: str) -> tuple[str, ...]:
    """Different names of objectives, separated by commas."""
    names = tuple(text.split(","))
    if not set(names) <= set(OBJECTIVES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"expected different objectives of {', '.join(OBJECTIVES)} with commas between them, got {text!r}"
        )
    return names
