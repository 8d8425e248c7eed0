"""``hne calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibration import (
    choose_confidence,
    conformal_thresholds,
    exit_curve,
    exit_point,
    fit_temperatures,
    nested_logits,
    prediction_sets,
    scaled_logits,
)
from ..data import Dataset
from ..distributed import choose_device
from ..evaluation import predict
from ..files import lock_folder
from ..metrics import calibration_gaps, expected_calibration_error, negative_log_likelihood
from ..models import HNE, checkpoint
from ..reporting import ProgressBar, check_plot_path, format_macs, mean_of, plot_reliability, show_table
from . import options
from .loading import checkpoint_path, load_model, load_test_data

_DESCRIPTION = """\
Calibrate a trained ensemble, so that a probability of 95 % is right in 95 % of the cases.

The test images are split by --seed. On one half, the temperature of each ensemble of the first
n = 1, 2, 3, ... N members is fitted: its probabilities are softmax(mean logits / temperature), or with
--average probabilities those of the logarithm of the mean probabilities / temperature. Before and after,
on the other half: NLL (negative log-likelihood, in nats) and ECE (expected calibration error in 15
bins), and a plot of accuracy against confidence (reliability.png).

The temperatures are kept in the checkpoint. `hne anytime` and hne.AnytimePredictor use them; accuracy
and the figures of `hne eval` stay as they are.

--target-accuracy A   the confidence at which an image is done, so that answers are right with
                      probability A at the lowest cost, for `hne anytime --confidence`
--target-macs M       the confidence that gives the best accuracy for M million multiply-adds an image
--coverage C          conformal sets: classes with at least this probability; a set holds the right
                      class with probability C
All are chosen on the first half, and tried on the other.
"""
_EXAMPLES = """\
  hne calibrate runs/digits-hne_tiny
  hne calibrate runs/digits-hne_tiny --target-accuracy 0.97 --coverage 0.95
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "calibrate", "fit probabilities to reality; choose thresholds", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute)
    options.add_checkpoint(parser)
    targets = parser.add_argument_group("targets")
    target = targets.add_mutually_exclusive_group()
    target.add_argument("--target-accuracy", type=options.positive_float, metavar="A", help="accuracy, up to 1")
    target.add_argument("--target-macs", type=options.positive_float, metavar="M", help="millions of multiply-adds")
    targets.add_argument("--coverage", type=options.positive_float, metavar="C", help="coverage of the sets, below 1")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the split (default: 0)")
    parser.add_argument(
        "--plot", type=options.path, metavar="FILE", help="file of the plot (default: reliability.png in the folder)"
    )
    options.add_average(parser)
    options.add_evaluation(parser, batch_size=256)


def execute(args: argparse.Namespace) -> int:
    """Calibrate, print the tables, and write plot and checkpoint."""
    path = checkpoint_path(args.checkpoint)
    plot = args.plot or path.parent / "reliability.png"
    check_plot_path(plot)
    device = choose_device(args.device)
    with options.computing(args):
        model, stored = load_model(args.checkpoint, device)
        if stored["data"].get("target") is not None:
            raise ValueError(f"expected a classifier, got a regression of {stored['data']['name']}")
        dataset = load_test_data(args, stored).to(device)
        if len(dataset.test) < 2:
            raise ValueError(f"expected at least two test images, got {len(dataset.test)}")
        with ProgressBar(len(dataset.test), hidden=args.quiet) as bar:
            batches = predict(model, dataset.test, dataset.input, args.batch_size, progress=bar.update)
            with torch.inference_mode():
                outputs, targets = zip(*batches, strict=True)
        logits, target = nested_logits(torch.cat(outputs, 1), args.average), torch.cat(targets)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(args.seed)).to(device)
    fitting, trying = order[: len(order) // 2], order[len(order) // 2 :]
    temperatures = fit_temperatures(logits[:, fitting], target[fitting])
    scaled = scaled_logits(logits, temperatures)
    tried = (logits[:, trying], scaled[:, trying], target[trying])
    _show_temperatures(temperatures, *tried, args.average, title=f"{args.checkpoint} on {dataset.name}")
    calibration: dict[str, Any] = {
        "temperatures": list(temperatures),
        "average": args.average,
        "images": len(fitting),
    }
    if args.target_accuracy is not None or args.target_macs is not None:
        calibration["confidence"] = _choose_exit(model, dataset, scaled, target, (fitting, trying), args)
    if args.coverage is not None:
        calibration["conformal"] = _make_sets(scaled, target, (fitting, trying), args)
    plot_reliability({"as trained": tried[0][-1], "calibrated": tried[1][-1]}, target[trying], plot)
    with lock_folder(path.parent):
        tensors, config = checkpoint.load(path)
        checkpoint.save(path, tensors, {**config, "calibration": calibration})
    print(f"wrote {plot.name}, {path.name} to {path.parent}")
    return 0


def _show_temperatures(
    temperatures: Sequence[float], before: Tensor, after: Tensor, target: Tensor, average: str, *, title: str
) -> None:
    """Print the temperature of each ensemble, and what it changes."""

    def figures(logits: Tensor) -> list[tuple[float, float]]:
        nll = negative_log_likelihood(logits, target)
        ece = expected_calibration_error(calibration_gaps(logits, target), len(target))
        return list(zip(nll.tolist(), ece.tolist(), strict=True))

    show_table(
        ["n", "temperature", "NLL", "calibrated", "ECE", "calibrated"],
        [
            (n, f"{t:.3f}", f"{nll:.4f}", f"{new_nll:.4f}", f"{ece:.4f}", f"{new_ece:.4f}")
            for n, (t, (nll, ece), (new_nll, new_ece)) in enumerate(
                zip(temperatures, figures(before), figures(after), strict=True), start=1
            )
        ],
        title=title,
        caption=f"NLL and ECE on {len(target)} images that the temperatures were not fitted to; {mean_of(average)}",
    )


def _choose_exit(
    model: HNE,
    dataset: Dataset,
    logits: Tensor,
    target: Tensor,
    halves: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> float:
    """Choose the confidence for the target, and print what it gives on both halves."""
    size = dataset.input.size
    costs = [model.macs(n, size) for n in range(1, model.num_models + 1)]
    cost = None if args.target_macs is None else args.target_macs * 1e6
    curve = exit_curve(logits[:, halves[0]], target[halves[0]], costs)
    chosen = choose_confidence(curve, accuracy=args.target_accuracy, cost=cost)
    other = exit_point(chosen.confidence, logits[:, halves[1]], target[halves[1]], costs)
    show_table(
        ["images", "confidence", "accuracy", "MACs an image"],
        [
            (name, f"{point.confidence:.4f}", f"{point.accuracy:.2%}", format_macs(round(point.cost)))
            for name, point in (("chosen on", chosen), ("tried on", other))
        ],
        title=f"\n--confidence {chosen.confidence:.4f} for `hne anytime`",
        caption=mean_of(args.average),
        text_columns=1,
    )
    return chosen.confidence


def _make_sets(
    logits: Tensor, target: Tensor, halves: tuple[Tensor, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Choose the thresholds of conformal sets, and print size and coverage of the sets on the other half."""
    thresholds = conformal_thresholds(logits[:, halves[0]], target[halves[0]], args.coverage)
    sets = prediction_sets(logits[:, halves[1]], thresholds)
    holds = sets.gather(2, target[halves[1]].expand(len(sets), -1)[..., None])[..., 0].float().mean(1)
    show_table(
        ["n", "least probability", "classes in a set", "coverage"],
        [
            (n, f"{threshold:.4f}", f"{size:.2f}", f"{share:.2%}")
            for n, (threshold, size, share) in enumerate(
                zip(thresholds, sets.sum(-1).float().mean(1).tolist(), holds.tolist(), strict=True), start=1
            )
        ],
        title=f"\nconformal sets for a coverage of {args.coverage:.2%}",
        caption=mean_of(args.average),
    )
    return {"coverage": args.coverage, "thresholds": list(thresholds)}
