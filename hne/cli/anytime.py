"""``hne anytime``."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from statistics import median

import torch

from ..data import Dataset, InputFormat, evaluation_batches, image_files
from ..distributed import choose_device
from ..errors import DataError, ResultError
from ..evaluation import measure_anytime
from ..inference import Answer, AnytimePredictor
from ..models import HNE, QuantizedHNE
from ..reporting import ProgressBar, check_plot_path, format_macs, mean_of, plot_accuracy_against_time, show_table
from . import options
from .loading import checkpoint_path, load_network, load_test_data

_DESCRIPTION = """\
Evaluate the members of the ensemble one after the other. Each computes only the part of the tree
that the earlier ones have not. Times count from the decoded image to the answer.

Without limits: a table and a plot of the accuracy of the first n members on the test images of a
data set, against the time at which their answer is ready.

With limits, each image gets as many members as they allow:
  --deadline-ms D   a member starts only if it is expected to finish in time, judged by the times
                    measured so far. The first member is always evaluated: if it takes too long,
                    its answer is given and marked late.
  --confidence P    an image is done when the ensemble's probability of its class is at least P (scaled
                    by a temperature after `hne calibrate`) ...
  --agreement K     ... or when K of its members predict the ensemble's class
A table shows how often each number of members was used, and how accurate those answers were.
With --images: a line for each picture in the folder instead.
"""
_EXAMPLES = """\
  hne anytime runs/digits-hne_tiny
  hne anytime runs/digits-hne_tiny --deadline-ms 2
  hne anytime runs/digits-hne_tiny --confidence 0.95 --batch-size 64
  hne anytime runs/imagenet-hne_mobilenetv2_075 --images ~/pictures --deadline-ms 20
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "anytime", "answer within a deadline, or until confident", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute)
    options.add_checkpoint(parser)
    limits = parser.add_argument_group("limits")
    limits.add_argument("--deadline-ms", type=options.positive_float, metavar="D", help="milliseconds per batch")
    limits.add_argument(
        "--confidence", type=options.positive_float, metavar="P", help="probability at which an image is done, up to 1"
    )
    limits.add_argument(
        "--agreement", type=options.positive_int, metavar="K", help="agreeing members at which an image is done, from 2"
    )
    parser.add_argument(
        "--plot",
        type=options.path,
        metavar="FILE",
        help="file of the plot (default: anytime.png beside the checkpoint)",
    )
    parser.add_argument("--images", type=options.path, metavar="FOLDER", help="a folder of pictures")
    options.add_average(parser, default=None, by_default="what `hne calibrate` has calibrated, else logits")
    options.add_evaluation(parser, batch_size=1)


def execute(args: argparse.Namespace) -> int:
    """Answer each image within the limits; without limits, print and plot accuracy against time."""
    limits = {name: getattr(args, name) for name in ("deadline_ms", "confidence", "agreement")}
    limited = any(value is not None for value in limits.values())
    if args.plot is not None and (limited or args.images is not None):
        raise ValueError("--plot: expected without limits and --images, which give no curve to plot")
    if args.plot is not None:
        check_plot_path(args.plot)
    device = choose_device(args.device)
    with options.computing(args):
        model, stored = load_network(args.checkpoint, device)
        model.metadata = stored  # the predictor scales by the temperatures of `hne calibrate`
        if stored["data"].get("target") is not None:
            raise ValueError(f"expected a classifier, got a regression of {stored['data']['name']}")
        if not limited and args.images is None:
            return _show_curve(model, load_test_data(args, stored).to(device), args)
        predictor = AnytimePredictor(model, **limits, average=args.average)
        input_format = InputFormat.from_dict(stored["data"]["input"])
        black = torch.zeros(args.batch_size, *input_format.size, input_format.channels).byte()
        predictor.calibrate(input_format.normalise(black.to(device)))
        if args.images is not None:
            return _answer_folder(predictor, input_format, stored["data"]["classes"], device, args)
        return _answer_dataset(predictor, load_test_data(args, stored).to(device), device, args)


def _show_curve(model: HNE | QuantizedHNE, dataset: Dataset, args: argparse.Namespace) -> int:
    """Print and plot accuracy against time."""
    average = args.average or model.metadata.get("calibration", {}).get("average", "logits")
    with ProgressBar(len(dataset.test), hidden=args.quiet) as bar:
        curve = measure_anytime(model, dataset, average=average, batch_size=args.batch_size, progress=bar.update)
    batch = "an image" if args.batch_size == 1 else f"a batch of {args.batch_size}"
    title = f"{args.checkpoint} on {dataset.name}, {batch} at a time"
    show_table(
        ["n", "MACs", "ready (ms)", "slowest", "accuracy"],
        [
            (p.num_models, format_macs(p.macs), f"{p.milliseconds:.2f}", f"{p.slowest:.2f}", f"{p.accuracy:.2%}")
            for p in curve
        ],
        title=title,
        caption=(
            f"ready: median over the batches; {len(dataset.test)} images, {torch.get_num_threads()} thread(s), "
            f"{mean_of(average)}"
        ),
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
    """Print a line for each picture; return 1 if one could not be read."""
    files = image_files(args.images)
    rows: list[tuple[object, ...]] = []
    late = unreadable = 0
    with ProgressBar(len(files), hidden=args.quiet) as bar:
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
            if not answer.logits.isfinite().all():
                raise ResultError("the logits are not finite: the model has diverged, or its inputs are wrong")
            late += answer.late * len(paths)
            used = answer.num_models.tolist()
            for path, probabilities, num_models in zip(paths, answer.probabilities, used, strict=True):
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
        title=f"{predictor.model.num_models} models, {_limits(args)}, {mean_of(predictor.average)}",
        caption=_late(late, len(rows), args) + (f"; {unreadable} unreadable" if unreadable else ""),
        text_columns=2,
    )
    return 1 if unreadable else 0


def _answer_dataset(
    predictor: AnytimePredictor, dataset: Dataset, device: torch.device, args: argparse.Namespace
) -> int:
    """Print how often each number of members was used, and how accurate those answers were."""
    answers: list[Answer] = []
    count, right = Counter[int](), Counter[int]()
    batches = evaluation_batches(dataset.test, dataset.input, args.batch_size, device=device)
    with ProgressBar(len(dataset.test), hidden=args.quiet) as bar:
        for images, target in batches:
            answer = predictor(images)
            answers.append(answer)
            count.update(answer.num_models.tolist())
            hits = answer.logits.argmax(-1) == target
            right.update(answer.num_models[hits].tolist())
            bar.update(len(target))
    answered = count.total()
    late = sum(answer.late * len(answer.logits) for answer in answers)
    ready = sorted(answer.ready * 1e3 for answer in answers)
    overrun = sum(answer.returned > answer.deadline for answer in answers)
    show_table(
        ["n", "images", "share", "accuracy"],
        [(n, count[n], f"{count[n] / answered:.1%}", f"{right[n] / count[n]:.2%}") for n in sorted(count)],
        title=f"{args.checkpoint} on {dataset.name}, {_limits(args)}, {mean_of(predictor.average)}",
        caption=(
            f"accuracy {right.total() / answered:.2%} with "
            f"{sum(n * images for n, images in count.items()) / answered:.2f} models on average\n"
            f"answers ready after {median(ready):.2f} ms (median), {ready[-1]:.2f} ms (longest); "
            f"{overrun} of {len(answers)} returned after the deadline\n{_late(late, answered, args)}"
        ),
    )
    return 0


def _limits(args: argparse.Namespace) -> str:
    """The limits in a line."""
    limits = []
    if args.deadline_ms is not None:
        limits.append(f"deadline {args.deadline_ms:g} ms")
    if args.confidence is not None:
        limits.append(f"until {args.confidence:.3g} sure")
    if args.agreement is not None:
        limits.append(f"until {args.agreement} agree")
    return ", ".join(limits) or "no limits"


def _late(late: int, images: int, args: argparse.Namespace) -> str:
    """The number of late answers, as a line."""
    if not late:
        return f"all {images} answers were ready in time"
    return f"{late} of {images} answers were late: not even the first model was ready after {args.deadline_ms:g} ms"
