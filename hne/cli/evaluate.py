"""``hne eval``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..data import SEVERITIES, Corruption, Dataset, Images
from ..distributed import choose_device
from ..evaluation import (
    Evaluation,
    OODEvaluation,
    RegressionOODEvaluation,
    evaluate_corruptions,
    evaluate_ood,
    evaluate_regression,
    evaluate_regression_ood,
    evaluate_widths,
)
from ..files import check_writable, write_json
from ..models import HNE, QuantizedHNE
from ..reporting import (
    ProgressBar,
    show_corruptions,
    show_evaluation,
    show_ood,
    show_regression_ood,
    show_uncertainty,
    show_widths,
)
from . import options
from .loading import load_corruptions, load_model, load_network, load_ood_images, load_test_data

_DESCRIPTION = """\
Test a trained ensemble: for n = 1, 2, 4, ... N, the cost per image of the ensemble of the first n
members (MACs: multiply-adds) and the quality of its prediction: the softmax of the members' mean
logits, or with --average probabilities the mean of their probabilities:

  accuracy, NLL   negative log-likelihood of the right class, in nats
  Brier           squared distance of the probabilities from the label (0 to 2)
  ECE             expected calibration error: distance of confidence from accuracy, in 15 bins

and how diverse and uncertain the members are; entropy and MI are those of their mixture, the mean of
their probabilities:

  diversity       population standard deviation of the logits over the members
  disagreement    share of the pairs of members that predict different classes
  entropy         predictive entropy, in nats
  MI              mutual information: the part of the entropy that comes from disagreement

--ood DATA adds out-of-distribution (OOD) images: the test images of a data set or the pictures in a
folder, resized, made grey or RGB and normalised like the images that the checkpoint was trained on.
AUROC, AUPR and FPR95 show how well a score separates them from the test images: entropy and MI of the
members; the ensemble's largest probability; and of the mean logits the largest one and the energy (minus
the log of the sum of exponentials). OOD images are the positive class: FPR95 is the share of test images
taken for OOD where 95 % of the OOD images are detected. --average changes the largest probability only.

--corruptions adds corrupted test images (Hendrycks and Dietterich 2019): `all` or names with commas
between them, for corruptions that are applied to the test images,

  gaussian_noise, shot_noise, impulse_noise, defocus_blur, brightness, contrast, pixelate,
  jpeg_compression

or a folder in the format of CIFAR-10-C and CIFAR-100-C (labels.npy, and an array NAME.npy for each
corruption). A table has means over the severities for each corruption; another the error for each
severity and the mean corruption error. --json has all severities of all corruptions.

A model of `hne train --widths` has a table over its widths and n, in which * marks the Pareto front:
choices that are more accurate than each cheaper one. All else is of full width.

For a regression (diabetes): RMSE and NLL of the members' mixture in the units of the target, and how well
its intervals are calibrated: coverage error is the mean distance between the share of the targets inside
an interval and its probability, over central intervals of 5, 10, ... 95 %. --ood permuted takes each
measurement from another test sample, --ood scaled triples its distance from the mean; both are detected
by the deviation of the mixture, and by the diversity, the deviation of the members' means.
"""
_EXAMPLES = """\
  hne eval runs/digits-hne_tiny
  hne eval runs/digits-hne_tiny --ood fashion-mnist
  hne eval runs/digits-hne_tiny --ood ~/pictures --json figures.json
  hne eval runs/digits-hne_tiny --corruptions all
  hne eval runs/cifar10-hne_resnet50_cifar --corruptions ~/data/CIFAR-10-C
  hne eval runs/digits-hne_tiny --naive        the same weights in plain PyTorch
  hne eval runs/cifar100-hne_resnet50_cifar/checkpoint.safetensors --data-dir ~/data
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "eval", "test a trained ensemble", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute)
    options.add_checkpoint(parser)
    parser.add_argument(
        "--ood",
        type=options.path_text,
        metavar="DATA",
        help="out-of-distribution images: a data set, or a folder of pictures; in a regression permuted or scaled",
    )
    corruptions = parser.add_argument_group("corrupted images")
    corruptions.add_argument(
        "--corruptions",
        type=options.path_text,
        metavar="SOURCE",
        help="all, names of corruptions with commas between them, or a folder of CIFAR-10-C",
    )
    corruptions.add_argument(
        "--severities",
        type=options.positive_ints,
        default=SEVERITIES,
        metavar="S1,S2,...",
        help="severities of the corruptions (default: 1,2,3,4,5)",
    )
    corruptions.add_argument(
        "--corruption-seed", type=options.whole_number, default=0, metavar="K", help="seed of the noise (default: 0)"
    )
    options.add_average(parser)
    parser.add_argument("--json", type=options.path, metavar="FILE", help="also write all results to FILE")
    parser.add_argument("--naive", action="store_true", help="compute with the plain PyTorch implementation")
    options.add_evaluation(parser, batch_size=256)


def execute(args: argparse.Namespace) -> int:
    """Evaluate, and print the tables."""
    if args.json is not None:
        check_writable(args.json)
    device = choose_device(args.device)
    with options.computing(args):
        model: HNE | QuantizedHNE
        model, stored = (
            load_model(args.checkpoint, device, naive=True) if args.naive else load_network(args.checkpoint, device)
        )
        dataset = load_test_data(args, stored)
        if dataset.target is not None and args.average != "logits":
            raise ValueError(
                f"--average: expected data with classes; the ensembles of {dataset.name} are mixtures of Gaussians"
            )
        ood_images = load_ood_images(args, dataset)
        corrupted = load_corruptions(args, dataset)
        dataset = dataset.to(device)
        widths = model.widths if isinstance(model, HNE) and dataset.target is None else ()
        with ProgressBar(len(dataset.test) * max(1, len(widths)), hidden=args.quiet) as bar:
            common: dict[str, Any] = {"batch_size": args.batch_size, "progress": bar.update}
            evaluation = (
                evaluate_widths(model, dataset, average=args.average, **common)
                if dataset.target is None
                else evaluate_regression(model, dataset, **common)
            )
        show_evaluation(evaluation, f"{args.checkpoint} on {dataset.name}")
        if isinstance(evaluation, Evaluation):
            if evaluation.narrower:
                show_widths(evaluation, "\nat each width")
            show_uncertainty(evaluation, f"uncertainty on {dataset.name}")
        results: dict[str, Any] = {"data": dataset.name, "evaluation": evaluation.to_dict()}
        if ood_images is not None:
            results["ood"] = _evaluate_ood(model, dataset, ood_images.to(device), args)
        if isinstance(evaluation, Evaluation) and corrupted:
            results["corruptions"] = _evaluate_corruptions(model, dataset, evaluation, corrupted, args)
    if args.json is not None:
        write_json(args.json, results)
        print(f"wrote {args.json}")
    return 0


def _evaluate_ood(
    model: HNE | QuantizedHNE, dataset: Dataset, images: Images, args: argparse.Namespace
) -> dict[str, Any]:
    """Evaluate the detection of OOD data, print the table, and return the results as JSON-able values."""
    ensembles: Sequence[OODEvaluation | RegressionOODEvaluation]
    with ProgressBar(len(dataset.test) + len(images), hidden=args.quiet) as bar:
        common: dict[str, Any] = {"batch_size": args.batch_size, "progress": bar.update}
        if dataset.target is None:
            ensembles = found = evaluate_ood(model, dataset, images, average=args.average, **common)
            show = functools.partial(show_ood, found, average=args.average)
        else:
            ensembles = of_samples = evaluate_regression_ood(model, dataset, images, **common)
            show = functools.partial(show_regression_ood, of_samples)
    source = f"images of {args.ood}" if dataset.target is None else f"samples, {args.ood},"
    show(title=f"{len(images)} OOD {source} against those of {dataset.name}")
    return {"data": args.ood, "images": len(images), "ensembles": [asdict(ensemble) for ensemble in ensembles]}


def _evaluate_corruptions(
    model: HNE | QuantizedHNE,
    dataset: Dataset,
    clean: Evaluation,
    corrupted: Sequence[Corruption],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Evaluate on corrupted images, print the tables, and return the results as JSON-able values."""
    with ProgressBar(sum(len(corruption.images) for corruption in corrupted), hidden=args.quiet) as bar:
        evaluations = evaluate_corruptions(
            model, dataset, corrupted, average=args.average, batch_size=args.batch_size, progress=bar.update
        )
    show_corruptions(clean, evaluations, f"{dataset.name} with corruptions ({args.corruptions})")
    found = [evaluation.to_dict() for evaluation in evaluations]
    return {"source": args.corruptions, "seed": args.corruption_seed, "evaluations": found}
