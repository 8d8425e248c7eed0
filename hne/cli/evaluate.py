"""``hne eval``."""

from __future__ import annotations

import argparse

from ..distributed import choose_device
from ..evaluation import evaluate
from ..report import show_evaluation
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
for an image (MACs: multiply-adds), its accuracy and its negative log-likelihood (NLL, in nats).
"""
_EXAMPLES = """\
  hne eval runs/digits-hne_tiny
  hne eval runs/digits-hne_tiny --naive        the same weights in plain PyTorch
  hne eval runs/cifar100-hne_resnet50_cifar/checkpoint.safetensors --data-dir ~/data
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "eval", "test a trained ensemble", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument("--naive", action="store_true", help="compute with the plain PyTorch implementation")
    parser.add_argument("--batch-size", type=positive, metavar="K", default=256, help="images at a time (default: 256)")
    add_quiet(parser)
    add_data(parser, default="the one it was trained on")
    add_computing(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and show the table."""
    device = choose_device(args.device)
    with computing(args):
        model, config = load_model(args.checkpoint, device, naive=args.naive)
        dataset = load_test_data(args, config).to(device)
        with progress_bar(len(dataset.test), args) as bar:
            evaluation = evaluate(model, dataset, batch_size=args.batch_size, progress=bar.update)
    show_evaluation(evaluation, f"{args.checkpoint} on {dataset.name}")
    return 0
