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

from ..data import Dataset, InputFormat, evaluation_batches, image_files
from ..distributed import choose_device
from ..errors import DataError
from ..evaluation import measure_anytime
from ..inference.predictor import Answer, AnytimePredictor
from ..models.hne import HNE
from ..reporting import format_macs, plot_accuracy_against_time, show_table
from .options import (
    Subparsers,
    add_checkpoint,
    add_computing,
    add_data,
    add_quiet,
    checkpoint_path,
    computing,
    load_model,
    load_test_data,
    new_parser,
    positive,
    progress_bar,
)

_DESCRIPTION = """\
Evaluate the networks of the ensemble one after the other, each computing only what the earlier ones
have not. The time counts from the decoded image to the answer.

Without limits: how accurate the answer of the first n networks is on the test images of a data set,
and when it is ready; a table, and a plot of accuracy against time.

With limits, every image gets as many networks as they allow:
  --deadline-ms D   a network is begun only if it is expected to be done in time, by the times
                    measured so far. The first network is always evaluated: if even that takes too
                    long, its answer is given and marked late.
  --confidence P    an image is done when the ensemble's probability of its class is at least P ...
  --agreement K     ... or when K of its networks name the ensemble's class
A table shows how many networks were used how often, and how accurate those answers were.
With --images: a line for each picture below the folder instead.
"""
_EXAMPLES = """\
  hne anytime runs/digits-hne_tiny
  hne anytime runs/digits-hne_tiny --deadline-ms 2
  hne anytime runs/digits-hne_tiny --confidence 0.95 --batch-size 64
  hne anytime runs/imagenet-hne_mobilenetv2_075 --images ~/pictures --deadline-ms 20
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "anytime", "answers that get better with time", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--deadline-ms", type=_above_zero, metavar="D", help="milliseconds per batch")
    limits.add_argument("--confidence", type=_above_zero, metavar="P", help="probability that is sure enough, up to 1")
    limits.add_argument("--agreement", type=positive, metavar="K", help="networks of one mind that are enough, from 2")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="accuracy against time (default: anytime.png beside the checkpoint)"
    )
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
    """Answer every image within the limits, or show what each number of networks gives."""
    limits = {name: getattr(args, name) for name in ("deadline_ms", "confidence", "agreement")}
    limited = any(value is not None for value in limits.values())
    if args.plot is not None and (limited or args.images is not None):
        raise ValueError("--plot: expected without limits and --images, which give no curve to plot")
    device = choose_device(args.device)
    with computing(args):
        model, config = load_model(args.checkpoint, device)
        if config["data"].get("target") is not None:
            raise ValueError(f"expected a network that names classes, got a regression of {config['data']['name']}")
        if not limited and args.images is None:
            return _show_curve(model, load_test_data(args, config).to(device), args)
        predictor = AnytimePredictor(model, **limits)
        input_format = InputFormat.from_dict(config["data"]["input"])
        black = torch.zeros(args.batch_size, *input_format.size, input_format.channels).byte()
        predictor.calibrate(input_format.normalise(black.to(device)))
        if args.images is not None:
            return _answer_folder(predictor, input_format, config["data"]["classes"], device, args)
        return _answer_dataset(predictor, load_test_data(args, config).to(device), device, args)


def _show_curve(model: HNE, dataset: Dataset, args: argparse.Namespace) -> int:
    """Accuracy against time, as a table and a plot."""
    with progress_bar(len(dataset.test), args) as bar:
        curve = measure_anytime(model, dataset, batch_size=args.batch_size, progress=bar.update)
    batch = "an image" if args.batch_size == 1 else f"a batch of {args.batch_size}"
    title = f"{args.checkpoint} on {dataset.name}, {batch} at a time"
    show_table(
        ["n", "MACs", "ready (ms)", "slowest", "accuracy"],
        [
            (p.num_models, format_macs(p.macs), f"{p.milliseconds:.2f}", f"{p.slowest:.2f}", f"{p.accuracy:.2%}")
            for p in curve
        ],
        title=title,
        caption=f"ready: median over the batches; {len(dataset.test)} images, {torch.get_num_threads()} thread(s)",
    )
    path = args.plot or checkpoint_path(args.checkpoint).parent / "anytime.png"
    plot_accuracy_against_time(curve, path, title)
    print(f"wrote {path}")
    return 0


def _answer_folder(
    predictor: AnytimePredictor,
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
            answer = predictor(images)
            late += answer.late * len(paths)
            used = answer.num_models.tolist()
            for path, probabilities, num_models in zip(paths, answer.logits.softmax(-1), used, strict=True):
                confidence, label = probabilities.max(0)
                rows.append(
                    (
                        path.relative_to(args.images),
                        classes[int(label)],
                        f"{confidence.item():.1%}",
                        num_models,
                        f"{answer.ready * 1e3:.2f}{' late' if answer.late else ''}",
                    )
                )
    show_table(
        ["image", "class", "probability", "n", "ready (ms)"],
        rows,
        title=f"{predictor.model.num_models} models, {_limits(args)}",
        caption=_late(late, len(rows), args) + (f"; {unreadable} unreadable" if unreadable else ""),
        text_columns=2,
    )
    return 1 if unreadable else 0


def _answer_dataset(
    predictor: AnytimePredictor, dataset: Dataset, device: torch.device, args: argparse.Namespace
) -> int:
    """How many models were used how often, and how right they were."""
    answers: list[Answer] = []
    count, right = Counter[int](), Counter[int]()
    batches = evaluation_batches(dataset.test, dataset.input, args.batch_size, device=device)
    with progress_bar(len(dataset.test), args) as bar:
        for images, target in batches:
            answer = predictor(images)
            answers.append(answer)
            count.update(answer.num_models.tolist())
            hits = answer.logits.argmax(-1) == target
            right.update(answer.num_models[hits].tolist())
            bar.update(len(target))
    images_done = count.total()
    late = sum(answer.late * len(answer.logits) for answer in answers)
    ready = sorted(answer.ready * 1e3 for answer in answers)
    overrun = sum(answer.returned > answer.deadline for answer in answers)
    show_table(
        ["n", "images", "share", "accuracy"],
        [(n, count[n], f"{count[n] / images_done:.1%}", f"{right[n] / count[n]:.2%}") for n in sorted(count)],
        title=f"{args.checkpoint} on {dataset.name}, {_limits(args)}",
        caption=(
            f"accuracy {right.total() / images_done:.2%} with "
            f"{sum(n * images for n, images in count.items()) / images_done:.2f} models on average\n"
            f"answers ready after {median(ready):.2f} ms (median), {ready[-1]:.2f} ms (longest); "
            f"{overrun} of {len(answers)} returned after the deadline\n{_late(late, images_done, args)}"
        ),
    )
    return 0


def _limits(args: argparse.Namespace) -> str:
    """The limits, in a line."""
    limits = []
    if args.deadline_ms is not None:
        limits.append(f"deadline {args.deadline_ms:g} ms")
    if args.confidence is not None:
        limits.append(f"until {args.confidence:.3g} sure")
    if args.agreement is not None:
        limits.append(f"until {args.agreement} agree")
    return ", ".join(limits) or "no limits"


def _late(late: int, images: int, args: argparse.Namespace) -> str:
    """How many answers were not ready in time."""
    if not late:
        return f"all {images} answers were ready in time"
    return f"{late} of {images} answers were late: not even the first model was ready after {args.deadline_ms:g} ms"


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
