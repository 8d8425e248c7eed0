"""``hne compare``."""

from __future__ import annotations

import argparse
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..data import Dataset
from ..distributed import World, choose_device, join_world
from ..experiments import (
    System,
    compared_systems,
    comparison_panel,
    comparison_tables,
    lock_runs,
    macs_per_epoch,
    make_trainer,
    measure_quality,
    measure_times,
    read_run_state,
    run_name,
    training_table,
    write_comparison_report,
)
from ..models import HNE
from ..reporting import show_table
from ..training import TrainConfig
from . import config_options, options
from .loading import image_counts, load_ood_images, load_training_data
from .machine import machine_line
from .training_runs import ProgressReporter, hint_on_interrupt, train_runs

_DESCRIPTION = """\
What is an ensemble from one trained network worth? Train a network, make an HNE of it, and compare
this with what else the same cost of training gives:

  one network              the trained network by itself
  HNE of N from it         N networks that share a tree; all start from the trained one and are
                           fine-tuned for --fine-tune-epochs with --objective
  one network, trained on  the network alone, trained on for as many multiply-adds as the HNE
  deep ensemble of N       N independent networks, each trained for an N-th of the cost
  deep ensemble of k       as many as can be trained for --epochs each, if that is more than one
  MC dropout               one network with dropout after each block; its members are N passes

The cost of training is the number of multiply-adds of all forward passes. The budget is that of the
network and its fine-tuning; each system gets the whole number of epochs that comes closest to it.

For the ensembles of the first n = 1, 2, 3, ... N members, the report has accuracy, negative log-
likelihood (NLL), expected calibration error, with --ood the AUROC of telling other images from test
images by the predictive entropy, multiply-adds, and milliseconds for a batch of 1 and of 64 on this
machine. HNEs average logits; the others average probabilities, as is usual for them.

The folder --out gets compare.md, .csv, .png and .svg. Every training run has a folder in --runs,
named after its options. A finished run is not trained again, and an interrupted one continues after
its last epoch: the same command, given again, completes the comparison, or measures it once more.
"""
_EXAMPLES = """\
  hne compare                                            on digits: minutes on two cores
  hne compare --data fashion-mnist --preset hne_resnet18_cifar --width 0.25 --protocol quick \\
      --epochs 8 --limit-train 6000 --no-augment --ood digits --threads 2
  hne compare --data cifar100 --preset hne_wrn28_10 --fine-tune-epochs 20 --ood cifar10 --seeds 3 --amp
"""
_DEFAULTS = {"fine_tune_epochs": 2, "fine_tune_lr": None, "dropout": 0.1, "seeds": 1, "ood": None, "rounds": 15}


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(
        commands, "compare", "compare an ensemble from one network with others", _DESCRIPTION, _EXAMPLES
    )
    parser.set_defaults(execute=execute, **_DEFAULTS)
    comparison = parser.add_argument_group("comparison")
    for flag, help in (
        ("--out", "folder of the report (default: runs/compare-DATA-PRESET)"),
        ("--runs", "folder of the training runs (default: runs in --out)"),
    ):
        comparison.add_argument(flag, type=options.path, metavar="DIR", help=help)
    seeds = "train every system K times, with the seeds 0 to K - 1 (default: 1)"
    comparison.add_argument("--seeds", type=options.positive_int, metavar="K", help=seeds)
    ood = "out-of-distribution images: a data set, or a folder of pictures (see `hne eval`)"
    comparison.add_argument("--ood", type=options.path_text, metavar="DATA", help=ood)
    rounds = "time each call in K turns, and take the median (default: 15)"
    comparison.add_argument("--rounds", type=options.positive_int, metavar="K", help=rounds)
    options.add_quiet(comparison)
    options.add_data(parser, default="digits")
    config_options.add_options(parser.add_argument_group("training data"), *config_options.TRAINING_DATA)
    config_options.add_options(parser.add_argument_group("model"), "preset", "num_models", "width")
    fine = parser.add_argument_group("fine-tuning")
    help = "epochs of the HNE after --epochs of the network (default: 2)"
    fine.add_argument("--fine-tune-epochs", type=options.positive_int, metavar="K", help=help)
    help = "initial learning rate of these epochs, and of the network that is trained on (default: half of --lr)"
    fine.add_argument("--fine-tune-lr", type=options.positive_float, metavar="LR", help=help)
    helps = {"objective": "objective of the HNE (default: I+HD; see `hne train`)"}
    config_options.add_options(fine, "objective", "alpha", "temperature", helps=helps)
    dropout = parser.add_argument_group("MC dropout")
    dropout.add_argument("--dropout", type=float, metavar="RATE", help="rate of the dropout (default: 0.1)")
    optimisation = parser.add_argument_group("optimisation")
    config_options.add_options(optimisation, *config_options.OPTIMISATION)
    config_options.add_options(parser.add_argument_group("numerics"), *config_options.NUMERICS)
    options.add_computing(parser)


def execute(args: argparse.Namespace) -> int:
    """Train the missing runs, measure all systems, and report."""
    base = TrainConfig.of(**config_options.given_options(args))
    out = args.out or Path("runs") / f"compare-{base.data}-{base.preset}"
    folder = args.runs or out / "runs"
    with options.computing(args), join_world(choose_device(args.device)) as world:
        dataset = load_training_data(args, base)
        if dataset.target is not None:
            raise ValueError(f"data: expected a data set with classes, got {base.data}")
        ood_images = load_ood_images(args, dataset)
        repetitions = [
            compared_systems(
                replace(base, seed=seed),
                dataset,
                fine_tune_epochs=args.fine_tune_epochs,
                fine_tune_lr=args.fine_tune_lr or base.lr / 2,
                dropout=args.dropout,
            )
            for seed in range(args.seeds)
        ]
        systems = repetitions[0]
        training = training_table(systems)
        if world.main and not args.quiet:
            _introduce(base, dataset, world, out)
            show_table(training.columns, training.rows, title=training.title, text_columns=1)
        hint = "the same command, given again, continues after the last saved epoch"
        with hint_on_interrupt(world, hint), lock_runs(folder) if world.main else nullcontext():
            models = _train(repetitions, dataset, world, folder, args)
        if world.main:
            dataset = dataset.to(world.device)
            if ood_images is not None:
                ood_images = ood_images.to(world.device)
            measurements = [
                [measure_quality(system, models[run_name(system.config)], dataset, ood_images) for system in seeds]
                for seeds in zip(*repetitions, strict=True)
            ]
            ensembles = [system.ensemble(models[run_name(system.config)]) for system in systems]
            times = measure_times(ensembles, dataset, rounds=args.rounds)
            panel = comparison_panel(systems, measurements, times)
            title = f"Ensembles from one trained network: {base.preset} on {base.data}"
            about = f"{_about(base, dataset, world, args)}\n\n```sh\n{_command(args)}\n```"
            files = write_comparison_report(out, panel, training, title, about)
            for table in comparison_tables(panel):
                show_table(table.columns, table.rows, title=f"\n{table.title}", text_columns=1)
            print(f"\nwrote {', '.join(path.name for path in files)} to {out}", flush=True)
    return 0


def _introduce(base: TrainConfig, dataset: Dataset, world: World, out: Path) -> None:
    """Print data and options."""
    print(
        f"{base.preset} on {base.data}: {image_counts(dataset)}, "
        f"{config_options.protocol_line(base.to_dict())}\n"
        f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); results in {out}\n",
        flush=True,
    )


def _train(
    repetitions: list[tuple[System, ...]], dataset: Dataset, world: World, folder: Path, args: argparse.Namespace
) -> dict[str, HNE]:
    """Train every system to the end.

    Returns:
        The models by the names of their runs.
    """
    configs = {run_name(system.config): system.config for systems in repetitions for system in systems}
    macs = macs_per_epoch(configs.values(), dataset)
    done = {config: read_run_state(folder / name, config, dataset).epochs for name, config in configs.items()}
    models: dict[str, HNE] = {}
    runs = train_runs(
        {folder / name: config for name, config in configs.items()},
        lambda config: make_trainer(config, dataset, world, models),
        ProgressReporter(not world.main or args.quiet, macs, done),
        resume=True,
        eval_every=max(config.epochs for config in configs.values()),  # at the end only
        quiet=args.quiet,
    )
    for path, trainer in runs:
        models[path.name] = trainer.model
    return models


def _about(base: TrainConfig, dataset: Dataset, world: World, args: argparse.Namespace) -> str:
    """The setting, for the report."""
    seeds = f"Mean ± standard deviation over {args.seeds} seeds" if args.seeds > 1 else "One seed"
    ood = f" Out-of-distribution: images of {args.ood}." if args.ood else ""
    averages = "HNEs average logits, the others probabilities; the predictive entropy is that of mean probabilities."
    return (
        f"{seeds}; {image_counts(dataset)}, "
        f"{config_options.protocol_line(base.to_dict())}; HNE: alpha {base.alpha:g}, temperature "
        f"{base.temperature:g}; dropout {args.dropout:g}.{ood} {averages}\n\n"
        f"Times are of the networks of seed 0, medians of {args.rounds} turns, on {world.device}: "
        f"{machine_line()}."
    )


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the comparison, without the paths and the options that change no result."""
    given = config_options.given_options(args) | {option: getattr(args, option) for option in _DEFAULTS}
    return shlex.join(["hne", "compare", *config_options.as_flags(given, _DEFAULTS)])
