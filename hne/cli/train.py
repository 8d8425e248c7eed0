"""``hne train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..data import load_dataset
from ..distributed import choose_device, join_world
from ..errors import CheckpointError, TrainingError
from ..losses import OBJECTIVES
from ..models import checkpoint
from ..reporting import show_evaluation
from ..training.config import Recipe
from ..training.history import show_row
from ..training.run_directory import SUMMARY, final_evaluation, title, train_into
from ..training.trainer import CHECKPOINT, Run
from .options import Subparsers, add_computing, add_data, add_run, computing, new_parser, positives
from .recipe_options import (
    add,
    add_distillation,
    add_network,
    add_numerics,
    add_optimisation,
    add_training_data,
    given,
    protocol_line,
)

_DESCRIPTION = """\
Train a hierarchical neural ensemble. Every option that the result depends on is part of its recipe;
--protocol sets the usual ones together, and each can be given by itself. The folder --out gets

  checkpoint.safetensors   the network and the state of the run; a crash never damages it
  log.csv                  a row per epoch: rate, loss, speed, accuracy and NLL of each ensemble size
  summary.json             the recipe and the final figures
  accuracy.png             test accuracy against multiply-adds

Loss and img/s are those of training. After an evaluation, a table shows for n = 1, 2, 4, ... N what
the ensemble of the first n networks costs for an image (MACs: multiply-adds) and how good it is
(NLL: negative log-likelihood in nats).
"""
_EXAMPLES = """\
  hne train                                              scikit-learn's digits: needs no download
  hne train --data fashion-mnist --width 0.5 --epochs 5
  hne train --data cifar100 --data-dir ~/data --amp      the paper's protocol: 200 epochs
  hne train --data cifar100 --objective I --branches 16,16,16,16,16     independent networks
  hne train --resume --out runs/digits-hne_tiny          go on after an interruption

  torchrun --nproc-per-node=2 -m hne train --data cifar10 --sync-bn     two processes
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "train", "train an ensemble on a data set", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    add_run(parser, out="runs/DATA-PRESET")
    add_data(parser, default="digits")
    add_training_data(parser)
    network = add_network(parser)
    add(network, "--width", type=float, metavar="F", help="factor on every channel count (default: 1)")
    add(
        network,
        "--branches",
        type=positives,
        metavar="B0,B1,...",
        help="another tree: branches of each block, e.g. 1,1,1,16,16 (heads: --num-models)",
    )
    add(
        network,
        "--naive",
        action="store_true",
        help="train the plain PyTorch implementation, to compare with",
    )
    _add_objective(parser)
    optimisation = add_optimisation(parser)
    add(optimisation, "--seed", type=int, metavar="K", help="of weights, order and crops (default: 0)")
    add_computing(parser)
    add_numerics(parser)


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective")
    add(
        group,
        "--objective",
        choices=OBJECTIVES,
        help="what is minimised: I each network by itself (eq. 9), H the nested ensembles (eq. 10), D networks and "
        "HD nested ensembles distilled from the whole ensemble (eq. 11, 12) (default: I+HD)",
    )
    add_distillation(group)


def run(args: argparse.Namespace) -> int:
    """Train, or continue to train."""
    out, recipe = _plan(args)
    path = out / CHECKPOINT
    with computing(args), join_world(choose_device(args.device)) as world:
        dataset = load_dataset(
            recipe.data,
            args.data_dir,
            image_size=recipe.image_size,
            limit_train=recipe.limit_train,
            limit_test=recipe.limit_test,
        )
        training = Run(recipe, dataset, world)
        if args.resume and path.exists():
            training.restore(path)
        if world.main:
            if args.overwrite:
                for name in (CHECKPOINT, SUMMARY):
                    (out / name).unlink(missing_ok=True)
            if not args.quiet:
                _introduce(training, out, resumable=args.resume)
        _train(training, out, args)
    return 0


def _plan(args: argparse.Namespace) -> tuple[Path, Recipe]:
    """The folder and the recipe: from the options given, or from the run that is resumed."""
    options = given(args)
    recipe = Recipe.of(**options)
    out = args.out or Path("runs") / f"{recipe.data}-{recipe.preset}"
    path = out / CHECKPOINT
    if not path.exists() or args.overwrite:
        return out, recipe
    if not args.resume:
        raise TrainingError(
            f"{out} has a run already: --resume continues it, --overwrite replaces it, --out names another folder"
        )
    stored = Recipe.from_dict(checkpoint.load(path)[1]["recipe"])
    for name, value in options.items():
        if getattr(stored, name) != value:
            raise CheckpointError(
                f"{path}: the run has {name} = {getattr(stored, name)!r}, got {value!r}: "
                "a run is resumed with the options it was started with (leave them out)"
            )
    return out, stored


def _introduce(training: Run, out: Path, *, resumable: bool) -> None:
    """Say what is about to happen."""
    recipe, dataset, world = training.recipe, training.dataset, training.world
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    print(
        f"{recipe.preset}{' (naive)' if recipe.naive else ''}: {training.model.num_models} models, "
        f"{parameters:,} parameters\n"
        f"{recipe.data}: {len(dataset.train)} training and {len(dataset.test)} test images, "
        f"{len(dataset.classes)} classes\n"
        f"objective {recipe.objective}, protocol {recipe.protocol}: {protocol_line(recipe.to_dict())}\n"
        f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); "
        f"results in {out}"
    )
    if training.batch_size != recipe.batch_size:
        print(f"batch size {training.batch_size}: there are no more images")
    if resumable:
        print(f"resumed after epoch {training.epoch}" if training.epoch else "nothing to resume yet")


def _train(training: Run, out: Path, args: argparse.Namespace) -> None:
    """Train to the end, and say how it goes."""
    main, epochs = training.world.main, training.recipe.epochs
    rows = train_into(
        out, training, eval_every=args.eval_every, checkpoint_every=args.checkpoint_every, quiet=args.quiet
    )
    try:
        for row in rows:
            if main and not args.quiet:
                show_row(row, epochs)
    except KeyboardInterrupt:
        if main:
            hint = f"`hne train --resume --out {out}` continues after the last saved epoch"
            print(hint, file=sys.stderr)
        raise
    if main:
        show_evaluation(final_evaluation(training), title(training))
        print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")
