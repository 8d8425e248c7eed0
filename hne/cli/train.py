"""``hne train``."""

from __future__ import annotations

import argparse
import math
import sys
from argparse import SUPPRESS
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hne_kernels import available_backends

from .. import checkpoint
from ..architectures import PRESETS
from ..data import load_dataset
from ..distributed import choose_device, join_world
from ..errors import CheckpointError, TrainingError
from ..files import remove_leftovers
from ..logs import Row, write_csv, write_json
from ..losses import OBJECTIVES
from ..plots import accuracy_against_macs
from ..recipe import PROTOCOLS, SCHEDULES, Recipe
from ..report import show_evaluation
from ..training import CHECKPOINT, Run, describe
from .options import Subparsers, add_computing, add_data, add_quiet, computing, new_parser, positive, positives

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
    _add_output(parser)
    add_data(parser, default="digits")
    _add_training_data(parser)
    _add_network(parser)
    _add_optimisation(parser)
    add_computing(parser)
    _add_numerics(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/DATA-PRESET)")
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


def _add_training_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training data")
    _add(group, "--limit-train", type=positive, metavar="K", help="train on only K images")
    _add(
        group,
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="scale imagenet's images to this size (default: 224)",
    )
    _add(
        group,
        "--no-augment",
        dest="augment",
        action="store_false",
        help="no random crops and flips",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    _add(
        group,
        "--preset",
        choices=tuple(PRESETS),
        help="the architecture (default: one that suits the data; `hne info` lists them)",
    )
    _add(group, "--width", type=float, metavar="F", help="factor on every channel count (default: 1)")
    _add(group, "--num-models", type=positive, metavar="N", help="leaves of the tree")
    _add(
        group,
        "--branches",
        type=positives,
        metavar="B0,B1,...",
        help="another tree: branches of each block, e.g. 1,1,1,16,16 (heads: --num-models)",
    )
    _add(
        group,
        "--naive",
        action="store_true",
        help="train the plain PyTorch implementation, to compare with",
    )


def _add_optimisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    _add(
        group,
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="cifar and imagenet are the paper's; quick is for digits (default: what suits the data). "
        + " ".join(f"{name}: {_protocol(values)}." for name, values in PROTOCOLS.items()),
    )
    _add(
        group,
        "--objective",
        choices=OBJECTIVES,
        help="what is minimised: I each network by itself (eq. 9), H the nested ensembles (eq. 10), D networks and "
        "HD nested ensembles distilled from the whole ensemble (eq. 11, 12) (default: I+HD)",
    )
    _add(
        group,
        "--alpha",
        type=float,
        metavar="A",
        help="weight of the second term, the first has 1 - A (default: 0.5; imagenet 0.75)",
    )
    _add(group, "--temperature", type=float, metavar="T", help="of the distillation (default: 2)")
    _add(group, "--epochs", type=positive, metavar="K", help="passes over the training images")
    _add(
        group,
        "--batch-size",
        type=positive,
        metavar="K",
        help="images per step, of all processes together; an incomplete last batch is left out",
    )
    _add(group, "--lr", type=float, metavar="LR", help="initial learning rate of SGD")
    _add(
        group,
        "--schedule",
        choices=SCHEDULES,
        help="cosine to zero, or halving at 40, 60, 73, 83, 90 and 97 %% of the epochs",
    )
    _add(group, "--momentum", type=float, metavar="M", help="of SGD (default: 0.9)")
    _add(group, "--weight-decay", type=float, metavar="W", help="of all parameters")
    _add(
        group,
        "--clip-grad-norm",
        type=float,
        metavar="NORM",
        help="scale gradients down to this norm (default: off)",
    )
    _add(group, "--seed", type=int, metavar="K", help="of weights, order and crops (default: 0)")


def _add_numerics(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("numerics")
    _add(group, "--amp", action="store_true", help="compute in bfloat16 where it is safe (autocast)")
    _add(
        group,
        "--no-channels-last",
        dest="channels_last",
        action="store_false",
        help="give the network contiguous NCHW images instead of channels-last ones",
    )
    _add(
        group,
        "--sync-bn",
        action="store_true",
        help="with torchrun: batch statistics over all processes, for the result of a single one",
    )


def _add(group: Any, *names: str, **options: Any) -> None:
    """An option of the recipe: absent from the namespace unless the user has given it."""
    group.add_argument(*names, default=SUPPRESS, **options)


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
            out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            if args.overwrite:
                path.unlink(missing_ok=True)
            if not args.quiet:
                _introduce(training, out, resumable=args.resume)
        _train(training, out, args)
    return 0


def _plan(args: argparse.Namespace) -> tuple[Path, Recipe]:
    """The folder and the recipe: from the options given, or from the run that is resumed."""
    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names}
    recipe = Recipe.of(**given)
    out = args.out or Path("runs") / f"{recipe.data}-{recipe.preset}"
    path = out / CHECKPOINT
    if not path.exists() or args.overwrite:
        return out, recipe
    if not args.resume:
        raise TrainingError(
            f"{out} has a run already: --resume continues it, --overwrite replaces it, --out names another folder"
        )
    stored = Recipe.from_dict(checkpoint.load(path)[1]["recipe"])
    for name, value in given.items():
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
        f"objective {recipe.objective}, protocol {recipe.protocol}: {_protocol(recipe.to_dict())}\n"
        f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); "
        f"results in {out}"
    )
    if training.batch_size != recipe.batch_size:
        print(f"batch size {training.batch_size}: there are no more images")
    if resumable:
        print(f"resumed after epoch {training.epoch}" if training.epoch else "nothing to resume yet")


def _train(training: Run, out: Path, args: argparse.Namespace) -> None:
    """Train to the end; after every epoch, the files in ``out`` are up to date."""
    epochs = training.recipe.epochs
    eval_every = args.eval_every or math.ceil(epochs / 10)
    try:
        for row in training.train(eval_every=eval_every, quiet=args.quiet):
            if not training.world.main:
                continue
            last = row.epoch == epochs
            if last or row.epoch % args.checkpoint_every == 0:
                training.save(out / CHECKPOINT)
            write_csv(out / "log.csv", training.history)
            if not args.quiet:
                _show_row(row, epochs)
    except KeyboardInterrupt:
        if training.world.main:
            hint = f"`hne train --resume --out {out}` continues after the last saved epoch"
            print(hint, file=sys.stderr)
        raise
    if training.world.main:
        _finish(training, out)


def _show_row(row: Row, epochs: int) -> None:
    print(
        f"epoch {row.epoch:{len(str(epochs))}}/{epochs}  loss {row.loss:.4f}  lr {row.lr:.4g}  "
        f"{row.images_per_second:.0f} img/s",
        flush=True,
    )
    if row.evaluation is not None and row.epoch < epochs:
        show_evaluation(row.evaluation)


def _finish(training: Run, out: Path) -> None:
    """Write log, summary and plot, and show the final table."""
    recipe, history = training.recipe, training.history
    evaluation = history[-1].evaluation
    assert evaluation is not None  # the last epoch is always evaluated
    write_csv(out / "log.csv", history)
    write_json(
        out / "summary.json",
        {
            "recipe": recipe.to_dict(),
            "data": describe(training.dataset),
            "model": training.model.config(),
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
            "evaluation": evaluation.to_dict(),
            "mean_member_accuracy": evaluation.mean_member_accuracy,
            "loss": history[-1].loss,
            "seconds": sum(row.seconds for row in history),
            "images_per_second": median(row.images_per_second for row in history),
            "environment": {
                "torch": torch.__version__,
                "device": str(training.world.device),
                "processes": training.world.size,
                "threads": torch.get_num_threads(),
                "backends": available_backends(),
            },
        },
    )
    title = f"{recipe.preset} on {recipe.data}, {recipe.epochs} epochs"
    accuracy_against_macs({recipe.preset: evaluation}, out / "accuracy.png", title)
    show_evaluation(evaluation, title)
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")


def _protocol(values: dict[str, Any]) -> str:
    """The main figures of a recipe, in a line."""
    return (
        f"{values['epochs']} epochs, batch {values['batch_size']}, lr {values['lr']:g} "
        f"{values['schedule']}, weight decay {values['weight_decay']:g}"
    )
