"""``hne train``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..distributed import choose_device, join_world
from ..errors import CheckpointError
from ..evaluation import Evaluation
from ..models import checkpoint
from ..reporting import show_evaluation, show_widths
from ..training import CHECKPOINT, RUN_FILES, TrainConfig, Trainer, final_evaluation, run_title
from . import config_options, options
from .loading import image_counts, load_training_data
from .training_runs import RunReporter, check_unused, hint_on_interrupt, run_options, train_runs

_DESCRIPTION = """\
Train a hierarchical neural ensemble. --protocol sets the usual training options together, and each
of them can be given by itself. The folder --out gets

  checkpoint.safetensors   the model and the state of training; a crash never damages it
  log.csv                  per epoch: learning rate, loss, speed, accuracy and NLL of each ensemble
  summary.json             all options and the final results
  accuracy.png             test accuracy against multiply-adds
  tensorboard/             with --tensorboard: loss, and accuracy, NLL and ECE of each ensemble

Loss and images per second are those of training. Each evaluation prints a table of the ensembles of
the first n = 1, 2, 4, ... N members: their cost per image (MACs: multiply-adds), accuracy and NLL
(negative log-likelihood in nats).

--widths makes the channels slimmable: the same weights also compute with the first channels of each
layer alone. Each step trains full width by the objective, and three smaller ones on its predictions
(the sandwich rule of US-Nets). The table and the plot at the end show all widths and n, and which of
these choices are Pareto-optimal. With --branches 1,1,1,1 it is a single US-Net.
"""
_EXAMPLES = """\
  hne train                                              scikit-learn's digits: needs no download
  hne train --data fashion-mnist --width 0.5 --epochs 5
  hne train --widths 0.25,0.5,0.75,1 --epochs 60         slimmable channels
  hne train --data cifar100 --data-dir ~/data --amp      the paper's protocol: 200 epochs
  hne train --data folder --data-dir ~/pictures --image-size 128        your images, in train/CLASS/
  hne train --data cifar100 --objective I --branches 16,16,16,16,16     independent networks
  hne train --data cifar10 --backbone torchvision:resnet18 --branches 1,1,2,4 --lr 0.01 --epochs 20
  hne train --resume --out runs/digits-hne_tiny          continue after an interruption

  torchrun --nproc-per-node=2 -m hne train --data cifar10 --sync-bn     two processes
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "train", "train an ensemble on a data set", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute)
    options.add_run(parser, out="runs/DATA-PRESET")
    options.add_data(parser, default="digits")
    for title, names in (
        ("training data", config_options.TRAINING_DATA),
        ("model", ("preset", "num_models", "width", "widths", "branches", "naive")),
        ("start from a trained network", config_options.BACKBONE),
        ("objective", ("objective", "alpha", "temperature")),
        ("optimisation", (*config_options.OPTIMISATION, "seed")),
        ("numerics", config_options.NUMERICS),
        ("GPU", config_options.LAUNCHES),
    ):
        config_options.add_options(parser.add_argument_group(title), *names)
    options.add_computing(parser)


def execute(args: argparse.Namespace) -> int:
    """Train, or continue to train."""
    folder, config = _plan(args)
    with options.computing(args), join_world(choose_device(args.device)) as world:
        dataset = load_training_data(args, config)
        runs = train_runs(
            {folder: config},
            lambda config: Trainer.from_config(config, dataset, world),
            _Reporter(not world.main or args.quiet, args.resume),
            **run_options(args),
        )
        hint = f"`hne train --resume --out {folder}` continues after the last saved epoch"
        with hint_on_interrupt(world, hint):
            ((_, trainer),) = runs
        if world.main:
            evaluation = final_evaluation(trainer)
            show_evaluation(evaluation, run_title(trainer))
            if isinstance(evaluation, Evaluation) and evaluation.narrower:
                show_widths(evaluation, "\nat each width")
            print(f"wrote {', '.join(name for name in RUN_FILES if (folder / name).exists())} to {folder}")
    return 0


def _plan(args: argparse.Namespace) -> tuple[Path, TrainConfig]:
    """The folder and the config, from the given options or from the run to resume."""
    given = config_options.given_options(args)
    config = TrainConfig.of(**given)
    folder = args.out or Path("runs") / f"{config.data}-{config.preset}"
    check_unused([folder], args)
    path = folder / CHECKPOINT
    if not (args.resume and path.exists()):
        return folder, config
    try:
        stored = TrainConfig.from_dict(checkpoint.load(path)[1]["recipe"])
    except CheckpointError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not of a training run ({error!r}): --overwrite replaces it") from error
    for name, value in given.items():
        if getattr(stored, name) != value:
            raise CheckpointError(
                f"{path}: the run has {name} = {getattr(stored, name)!r}, got {value!r}: "
                "a run is resumed with the options it was started with (leave them out)"
            )
    return folder, stored


class _Reporter(RunReporter):
    """Prints the settings of the run before the first epoch."""

    def __init__(self, silent: bool, resume: bool) -> None:
        super().__init__(silent)
        self.resume = resume

    def start(self, folder: Path, trainer: Trainer) -> None:
        if self.silent:
            return
        config, dataset, world = trainer.config, trainer.dataset, trainer.world
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(
            f"{config.preset}{' (naive)' if config.naive else ''}: {trainer.model.num_models} models, "
            f"{parameters:,} parameters\n"
            f"{config.data}: {image_counts(dataset)}, {len(dataset.classes)} classes\n"
            f"objective {config.objective}, protocol {config.protocol}: "
            f"{config_options.protocol_line(config.to_dict())}\n"
            f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); "
            f"results in {folder}"
        )
        if trainer.model.widths:
            print(f"slimmable to widths {', '.join(f'{width:g}' for width in trainer.model.widths)}")
        if trainer.model.conversion is not None:
            print(f"backbone {trainer.model.conversion.summary}")
        if trainer.batch_size != config.batch_size:
            print(f"batch size {trainer.batch_size}: there are no more images")
        if self.resume:
            print(f"resumed after epoch {trainer.epoch}" if trainer.epoch else "nothing to resume yet")
