"""``hne anytime``."""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from ..data import Dataset, InputFormat, evaluation_batches
from ..data.folder import image_files
from ..deadline import Answer, DeadlinePredictor
from ..distributed import choose_device
from ..errors import DataError
from ..report import show_table
from .options import (
    Subparsers,
    add_checkpoint,
    add_computing,
    add_data,
    add_quiet,
    computing,
    load_model,
    load_test_data,
    new_parser,
    positive,
    progress_bar,
)

_DESCRIPTION = """\
Give for every image the best answer that is ready at the deadline. The networks of the ensemble
are evaluated one after the other, each computing only what the earlier ones have not; one is
begun only if it is expected to be done in time, by the times measured so far. The first network
is always evaluated: if even that takes too long, its answer is given and marked late. The time
counts from the decoded image to the answer.

With --images: a line for each picture below the folder. Otherwise: the test images of a data set,
and a table of how many networks were ready how often, and how accurate those answers were.
"""
_EXAMPLES = """\
  hne anytime runs/digits-hne_tiny --deadline-ms 2
  hne anytime runs/imagenet-hne_mobilenetv2_075 --images ~/pictures --deadline-ms 20
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "anytime", "the best answer that is ready by a deadline", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument("--deadline-ms", type=_milliseconds, metavar="D", required=True, help="milliseconds per batch")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of pictures")
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="K",
        default=1,
        help="images answered together (default: 1)",
    )
    add_quiet(parser)
    add_data(parser, default="the one it was trained on")
    add_computing(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every image in time."""
    device = choose_device(args.device)
    with computing(args):
        model, config = load_model(args.checkpoint, device)
        predictor = DeadlinePredictor(model)
        input_format = InputFormat.from_dict(config["data"]["input"])
        black = torch.zeros(args.batch_size, *input_format.size, input_format.channels).byte()
        predictor.calibrate(input_format.normalise(black.to(device)))
        if args.images is not None:
            return _answer_folder(predictor, input_format, config["data"]["classes"], device, args)
        return _answer_dataset(predictor, load_test_data(args, config).to(device), device, args)


def _answer_folder(
    predictor: DeadlinePredictor,
    input_format: InputFormat,
    classes: Sequence[str],
    device: torch.device,
    args: argparse.Namespace,
) -> int:
    """A line for each picture; 1 if one could not be read."""
    files = image_files(args.images)
    rows: list[tuple[object, ...]] = []
    late = unreadable = 0
    with progress_bar(len(files), args) as bar:
        for start in range(0, len(files), args.batch_size):
            paths, pixels = [], []
            for path in files[start : start + args.batch_size]:
                bar.update()
                try:
                    pixels.append(torch.from_numpy(input_format.read(path).copy()))
                    paths.append(path)
                except DataError as error:
                    warnings.warn(str(error), stacklevel=1)
                    unreadable += 1
            if not pixels:
                continue
            images = input_format.normalise(torch.stack(pixels).to(device))
            answer = predictor.answer(images, args.deadline_ms / 1e3)
            late += answer.late * len(paths)
            for path, probabilities in zip(paths, answer.logits.softmax(-1), strict=True):
                confidence, label = probabilities.max(0)
                rows.append(
                    (
                        path.relative_to(args.images),
                        classes[int(label)],
                        f"{confidence.item():.1%}",
                        answer.num_models,
                        f"{answer.ready * 1e3:.2f}{' late' if answer.late else ''}",
                    )
                )
    show_table(
        ["image", "class", "probability", "n", "ready (ms)"],
        rows,
        title=f"{predictor.model.num_models} models, deadline {args.deadline_ms:g} ms",
        caption=_late(late, len(rows), args) + (f"; {unreadable} unreadable" if unreadable else ""),
        text_columns=2,
    )
    return 1 if unreadable else 0


def _answer_dataset(
    predictor: DeadlinePredictor, dataset: Dataset, device: torch.device, args: argparse.Namespace
) -> int:
    """How many models were ready how often, and how right they were."""
    answers: list[Answer] = []
    count, right = Counter[int](), Counter[int]()
    batches = evaluation_batches(dataset.test, dataset.input, args.batch_size, device=device)
    with progress_bar(len(dataset.test), args) as bar:
        for images, target in batches:
            answer = predictor.answer(images, args.deadline_ms / 1e3)
            answers.append(answer)
            count[answer.num_models] += len(target)
            right[answer.num_models] += int((answer.logits.argmax(-1) == target).sum())
            bar.update(len(target))
    images_done = count.total()
    late = sum(answer.late * len(answer.logits) for answer in answers)
    ready = sorted(answer.ready * 1e3 for answer in answers)
    overrun = sum(answer.returned > answer.deadline for answer in answers)
    show_table(
        ["n", "images", "share", "accuracy"],
        [(n, count[n], f"{count[n] / images_done:.1%}", f"{right[n] / count[n]:.2%}") for n in sorted(count)],
        title=f"{args.checkpoint} on {dataset.name}, deadline {args.deadline_ms:g} ms",
        caption=(
            f"accuracy {right.total() / images_done:.2%} with "
            f"{sum(n * images for n, images in count.items()) / images_done:.2f} models on average\n"
            f"answers ready after {median(ready):.2f} ms (median), {ready[-1]:.2f} ms (longest); "
            f"{overrun} of {len(answers)} returned after the deadline\n{_late(late, images_done, args)}"
        ),
    )
    return 0


def _late(late: int, images: int, args: argparse.Namespace) -> str:
    """How many answers were not ready in time."""
    if not late:
        return f"all {images} answers were ready in time"
    return f"{late} of {images} answers were late: not even the first model was ready after {args.deadline_ms:g} ms"


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
