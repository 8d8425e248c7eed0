"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hne_kernels import use_backend
from hne_kernels.dispatch import BACKENDS

from ..data import DATASETS, Dataset, load_dataset
from ..errors import CheckpointError
from ..models import checkpoint
from ..models.hne import HNE
from ..training.trainer import CHECKPOINT

Subparsers = Any  # argparse has no public name for it


def new_parser(
    commands: Subparsers, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A command's parser, with the options that every command has."""
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
    """The option of commands that show progress."""
    parser.add_argument("--quiet", action="store_true", help="only the final table")


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Options that say where and by what a command computes."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto takes a GPU if there is one (default: auto)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="the kernels to use, as HNE_BACKEND does (default: the fastest that is usable; see `hne info`)",
    )
    group.add_argument("--threads", type=positive, metavar="K", help="CPU threads (default: what PyTorch takes)")


def add_run(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Options of commands that train: the folder, and how a run in it goes on; ``out`` goes into the help."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the run (default: {out})")
    start = group.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out to the same result as without the interruption, with the options "
        "it was started with; start it if it has no checkpoint yet",
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument(
        "--eval-every",
        type=positive,
        metavar="K",
        help="evaluate every K epochs and at the end (default: about ten times)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        metavar="K",
        default=1,
        help="save every K epochs and at the end (default: 1)",
    )
    add_quiet(group)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The positional argument that names a checkpoint."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint of `hne train`, or the folder that holds it",
    )


def add_data(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """Options that name a data set and say where it is; ``default`` goes into the help."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        choices=tuple(DATASETS),
        default=argparse.SUPPRESS,
        help=f"the data set (default: {default})",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with its files (default: $HNE_DATA, then the folders of system packages)",
    )
    group.add_argument(
        "--limit-test",
        type=positive,
        metavar="K",
        default=argparse.SUPPRESS,
        help="test on only K images, for a quick check",
    )


@contextmanager
def computing(args: argparse.Namespace) -> Iterator[None]:
    """Apply the options of :func:`add_computing`, device apart, and undo them at the end."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        if args.backend is not None:
            stack.enter_context(use_backend(args.backend))
        if args.threads is not None:
            torch.set_num_threads(args.threads)
            stack.callback(torch.set_num_threads, threads)
        yield


def progress_bar(images: int, args: argparse.Namespace) -> tqdm:
    """A bar on a terminal (disable=None), unless ``--quiet``."""
    return tqdm(total=images, unit="img", leave=False, disable=args.quiet or None)


def checkpoint_path(path: Path) -> Path:
    """The file of a checkpoint that may be named by its folder."""
    return path / CHECKPOINT if path.is_dir() else path


def load_model(path: Path, device: torch.device, *, naive: bool = False) -> tuple[HNE, dict]:
    """The network of a checkpoint on ``device``, and the config."""
    model, config = checkpoint.load_model(checkpoint_path(path), naive=naive)
    return model.to(device), config


def load_test_data(args: argparse.Namespace, config: dict[str, Any]) -> Dataset:
    """The data set to test on: the one named, or the one that the checkpoint was trained on.

    Raises:
        CheckpointError: its images or classes are not those that the checkpoint was trained for.
    """
    trained = config["data"]
    name = getattr(args, "data", trained["name"])
    dataset = load_dataset(
        name,
        args.data_dir,
        image_size=config["recipe"]["image_size"] if name == trained["name"] else None,
        limit_test=getattr(args, "limit_test", None),
    )
    check_fits(args.checkpoint, config, dataset)
    return dataset


def check_fits(path: Path, config: dict[str, Any], dataset: Dataset) -> None:
    """Check that a data set has the images and classes that a checkpoint was trained for.

    Raises:
        CheckpointError: it has not.
    """
    trained = config["data"]
    fits = (list(dataset.classes), dataset.input.channels, list(dataset.input.size))
    expected = trained["input"]
    if fits != (trained["classes"], expected["channels"], expected["size"]):
        raise CheckpointError(
            f"{checkpoint_path(path)}: trained on {trained['name']} "
            f"({_shape(len(trained['classes']), expected['channels'], expected['size'])}), does not "
            f"fit {dataset.name} ({_shape(len(dataset.classes), fits[1], fits[2])})"
        )


def _shape(classes: int, channels: int, size: Any) -> str:
    return f"{classes} classes, images {channels}x{size[0]}x{size[1]}"


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between them, for argparse."""
    return tuple(positive(number) for number in text.split(","))
