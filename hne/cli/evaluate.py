"""``hne eval``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import Dataset, ood_images
from ..distributed import choose_device
from ..evaluation import evaluate, evaluate_ood, evaluate_regression
from ..models.hne import HNE
from ..reporting import show_evaluation, show_ood, show_uncertainty
from ..training.history import write_json
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
Test a trained ensemble: for n = 1, 2, 4, ... N, what the ensemble of the first n networks costs
for an image (MACs: multiply-adds) and how good it is. Its answer is the softmax of the networks'
mean logits:

  accuracy, NLL   negative log-likelihood of the right class, in nats
  Brier           squared distance of the probabilities from the label (0 to 2)
  ECE             expected calibration error: distance of confidence from accuracy, in 15 bins

How different its networks are, and how uncertain their mixture (the mean of their probabilities):

  diversity       standard deviation of the logits over the networks
  disagreement    share of the pairs of networks that name different classes
  entropy         of the mixture, in nats
  MI              mutual information: the part of the entropy that is disagreement of the networks

--ood DATA adds images of another kind: the test images of a data set or the pictures in a folder,
resized, made grey or RGB and normalised as the images that the checkpoint was trained on. How well
the entropy (and the MI) tells them from the test images is shown as AUROC, AUPR and FPR95; the
foreign images are the positive class, and FPR95 is the share of the test images taken for foreign
where 95 % of the foreign ones are found.

Of a regression (diabetes): RMSE and NLL of the mixture, in the units of the target.
"""
_EXAMPLES = """\
  hne eval runs/digits-hne_tiny
  hne eval runs/digits-hne_tiny --ood fashion-mnist
  hne eval runs/digits-hne_tiny --ood ~/pictures --json figures.json
  hne eval runs/digits-hne_tiny --naive        the same weights in plain PyTorch
  hne eval runs/cifar100-hne_resnet50_cifar/checkpoint.safetensors --data-dir ~/data
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "eval", "test a trained ensemble", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument(
        "--ood",
        metavar="DATA",
        help="images from outside the distribution: a data set by name, or a folder of pictures",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE, too")
    parser.add_argument("--naive", action="store_true", help="compute with the plain PyTorch implementation")
    parser.add_argument("--batch-size", type=positive, metavar="K", default=256, help="images at a time (default: 256)")
    add_quiet(parser)
    add_data(parser, default="the one it was trained on")
    add_computing(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and show the tables."""
    device = choose_device(args.device)
    with computing(args):
        model, config = load_model(args.checkpoint, device, naive=args.naive)
        dataset = load_test_data(args, config)
        if dataset.target is not None:
            return _run_regression(model, dataset.to(device), args)
        foreign = None
        if args.ood is not None:
            limit = getattr(args, "limit_test", None)
            foreign = ood_images(args.ood, dataset.input, args.data_dir, limit=limit).to(device)
        dataset = dataset.to(device)
        with progress_bar(len(dataset.test), args) as bar:
            evaluation = evaluate(model, dataset, batch_size=args.batch_size, progress=bar.update)
        values: dict[str, Any] = {"data": dataset.name, "evaluation": evaluation.to_dict()}
        show_evaluation(evaluation, f"{args.checkpoint} on {dataset.name}")
        show_uncertainty(evaluation, f"uncertainty on {dataset.name}")
        if foreign is not None:
            with progress_bar(len(dataset.test) + len(foreign), args) as bar:
                found = evaluate_ood(model, dataset, foreign, batch_size=args.batch_size, progress=bar.update)
            show_ood(found, f"{len(foreign)} images of {args.ood} told from those of {dataset.name}")
            values["ood"] = {"data": args.ood, "images": len(foreign), "ensembles": [asdict(row) for row in found]}
    _write(values, args)
    return 0


def _run_regression(model: HNE, dataset: Dataset, args: argparse.Namespace) -> int:
    if args.ood is not None:
        raise ValueError(f"--ood: expected with classes, whose entropy tells foreign images; {dataset.name} has none")
    with progress_bar(len(dataset.test), args) as bar:
        evaluation = evaluate_regression(model, dataset, batch_size=args.batch_size, progress=bar.update)
    show_evaluation(evaluation, f"{args.checkpoint} on {dataset.name}")
    _write({"data": dataset.name, "evaluation": evaluation.to_dict()}, args)
    return 0


def _write(values: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json is not None:
        write_json(args.json, values)
        print(f"wrote {args.json}")
