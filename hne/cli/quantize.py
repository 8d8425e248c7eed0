"""``hne quantize``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import Images, evaluation_batches
from ..evaluation import Evaluation, RegressionEvaluation, evaluate, evaluate_regression
from ..files import check_writable
from ..models import checkpoint, quantize
from ..reporting import ProgressBar, format_macs, mean_of, show_table
from . import options
from .loading import checkpoint_path, load_model, load_test_data

_DESCRIPTION = """\
Convert a trained ensemble to int8, for inference on a CPU: weights int8 with a scale for each output
channel, features uint8. The range of every feature map is measured on training images. The table shows
the quality on the test images beside that of float32.

`hne eval` and `hne anytime` read the file; in Python, hne.models.checkpoint.load_quantized.
"""
_EXAMPLES = """\
  hne quantize runs/digits-hne_tiny
  hne quantize runs/cifar100-hne_resnet50_cifar --calibration-images 1024 --output int8.safetensors
  hne eval runs/digits-hne_tiny/int8.safetensors
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "quantize", "convert to int8 for CPUs", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute)
    options.add_checkpoint(parser)
    parser.add_argument(
        "--calibration-images",
        type=options.positive_int,
        metavar="K",
        default=512,
        help="training images on which ranges are measured (default: 512)",
    )
    parser.add_argument(
        "--output", type=options.path, metavar="FILE", help="the file (default: int8.safetensors beside the checkpoint)"
    )
    options.add_evaluation(parser, batch_size=256)


def execute(args: argparse.Namespace) -> int:
    """Convert, print the quality of both, and write the file."""
    if args.device == "cuda":
        raise ValueError("--device: expected cpu, on which int8 computes, got cuda")
    output = args.output or checkpoint_path(args.checkpoint).parent / "int8.safetensors"
    check_writable(output)
    with options.computing(args):
        model, stored = load_model(args.checkpoint, torch.device("cpu"))
        dataset = load_test_data(args, stored)
        evaluate_model = evaluate if dataset.target is None else evaluate_regression
        calibration = _evenly(dataset.train, args.calibration_images)
        with ProgressBar(len(calibration) + 2 * len(dataset.test), hidden=args.quiet) as bar:

            def batches() -> Iterator[Tensor]:
                for images, _ in evaluation_batches(calibration, dataset.input, args.batch_size):
                    yield images
                    bar.update(len(images))

            quantized = quantize(model, batches())
            before, after = (
                evaluate_model(network, dataset, batch_size=args.batch_size, progress=bar.update)
                for network in (model, quantized)
            )
    caption = f"{len(dataset.test)} test images; ranges of {len(calibration)} training images"
    if isinstance(before, Evaluation):
        caption += f"; {mean_of(before.average)}"
    _show_quality(before, after, f"{args.checkpoint} on {dataset.name}", caption)
    checkpoint.save_quantized(output, quantized, {name: stored[name] for name in ("data", "recipe")})
    print(f"wrote {output}")
    return 0


def _show_quality(
    before: Evaluation | RegressionEvaluation, after: Evaluation | RegressionEvaluation, title: str, caption: str
) -> None:
    """Print the quality of both networks, for each ensemble size."""
    metric = "accuracy" if isinstance(before, Evaluation) else "RMSE"
    show_table(
        ["n", "MACs", *(f"{name} {kind}" for name in (metric, "NLL") for kind in ("float32", "int8"))],
        [
            (*cost, metric, metric_int8, nll, nll_int8)
            for (*cost, metric, nll), (*_, metric_int8, nll_int8) in zip(_rows(before), _rows(after), strict=True)
        ],
        title=title,
        caption=caption,
    )


def _rows(evaluation: Evaluation | RegressionEvaluation) -> list[tuple[int, str, str, str]]:
    """For each ensemble its size and cost, and its accuracy or RMSE and its NLL."""
    if isinstance(evaluation, Evaluation):
        return [(e.num_models, format_macs(e.macs), f"{e.accuracy:.2%}", f"{e.nll:.4f}") for e in evaluation.ensembles]
    return [(e.num_models, format_macs(e.macs), f"{e.rmse:.4g}", f"{e.nll:.4f}") for e in evaluation.ensembles]


def _evenly(images: Images, count: int) -> Images:
    """``count`` of the images, or all, from everywhere in the split."""
    if len(images) <= count:
        return images
    return images.subset(torch.arange(count) * len(images) // count)
