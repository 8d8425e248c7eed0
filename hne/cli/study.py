"""``hne study``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from ..data import Dataset
from ..distributed import World, choose_device, join_world
from ..errors import TrainingError
from ..evaluation import Evaluation
from ..experiments import (
    STUDIES,
    Panel,
    PanelResult,
    RunState,
    StudySettings,
    collect_results,
    macs_per_epoch,
    panel_tables,
    read_run_state,
    run_name,
    study_panels,
    study_trainer,
    training_configs,
    with_times,
    write_report,
)
from ..reporting import show_table
from ..training import TrainConfig, Trainer, final_evaluation
from . import config_options, options
from .loading import image_counts, load_training_data
from .machine import machine_line
from .training_runs import ProgressReporter, train_runs

_DESCRIPTION = """\
Repeat experiments of the HNE paper: train every model that they compare, over several seeds, and
write tables and figures.

  table1    accuracy of the ensembles of 1, 2, 4, ... N members, by objective: I, H, I+H, I+D, I+HD
  figure4   accuracy and diversity (population standard deviation of the logits) against multiply-adds, by
            distillation: none (I), from the whole ensemble to each member (I+D, for each of
            --alphas), hierarchical (I+HD)
  figure5   the same, by sharing scheme: the tree of an HNE, independent networks, a shared trunk
            (multi-branch), and for comparison one network at several --widths
  figure6   accuracy against multiply-adds and against measured milliseconds: HNEs by objective, and
            their rivals: early exits after the blocks of one network, MSDNet, a slimmable network at
            four widths, and one network at several --widths
  figure9   accuracy of the ensembles and of each member by itself: I, I+D, I+HD

Several studies can be named at once. Each writes NAME.md and NAME.csv (mean and standard deviation
over the seeds) into --out and, except for table1, NAME.png and NAME.svg. Times are medians of
calls for one image on the CPU, which take turns, of the models of the first seed.

Every training run has a folder in --runs, named after its options. Studies share runs. A finished
run is not trained again, and an interrupted one continues after its last epoch. The same command,
given again, therefore completes a study, and with other options it trains only the runs that
change. --dry-run lists the finished and the missing runs. Given several times at once, say once for
each GPU, the command shares the runs out: none is trained by two processes.

--data, --epochs, --limit-train, --scale, --num-models and --seeds set the size of a study. By
default it follows the paper's protocol for the data set (quick for digits) at full width with 3
seeds. --scale is a factor on the channel counts of all networks; cost and time grow about with its
square, and 0.5 makes the paper's small networks. Several scales are reported side by side.
"""
_EXAMPLES = """\
  hne study table1                                          on digits: minutes on two cores
  hne study table1 figure4 figure5 figure9 --data fashion-mnist --preset hne_tiny --scale 0.5 \\
      --protocol quick --batch-size 32 --lr 0.2 --epochs 5 --limit-train 20000 --no-augment
  hne study table1 --data cifar100 --scale 1,0.5 --amp      the paper's protocol: for a GPU
  hne study figure4 --data cifar100 --scale 1,0.5 --amp --dry-run
  CUDA_VISIBLE_DEVICES=1 hne study table1 --data cifar100 --scale 1,0.5 --amp    a second GPU takes part
"""
_DEFAULTS = {
    "scale": (1.0,),
    "seeds": 3,
    "objectives": StudySettings.objectives,
    "alphas": StudySettings.alphas,
    "widths": StudySettings.widths,
    "rounds": 20,
}


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "study", "repeat the paper's experiments", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute, **_DEFAULTS)
    parser.add_argument("studies", nargs="+", choices=tuple(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    study = parser.add_argument_group("study")
    for flag, help in (
        ("--out", "folder of the reports (default: runs/study-DATA-PRESET)"),
        ("--runs", "folder of the training runs (default: runs in --out)"),
    ):
        study.add_argument(flag, type=options.path, metavar="DIR", help=help)
    seeds = "train every config K times, with the seeds 0 to K - 1 (default: 3)"
    study.add_argument("--seeds", type=options.positive_int, metavar="K", help=seeds)
    rounds = "time each call in K turns, and take the median (default: 20)"
    study.add_argument("--rounds", type=options.positive_int, metavar="K", help=rounds)
    dry_run = "train nothing: list the runs with their state, and report on the finished ones"
    study.add_argument("--dry-run", action="store_true", help=dry_run)
    options.add_quiet(study)
    options.add_data(parser, default="digits")
    config_options.add_options(parser.add_argument_group("training data"), *config_options.TRAINING_DATA)
    config_options.add_options(parser.add_argument_group("model"), "preset", "num_models")
    comparisons = parser.add_argument_group("comparisons")
    objectives = f"objectives of table1 (default: {','.join(StudySettings.objectives)})"
    comparisons.add_argument("--objectives", type=options.objectives, metavar="O,O,...", help=objectives)
    helps = {"objective": "objective of the ensembles of figure5 (default: I+HD)"}
    config_options.add_options(comparisons, "objective", "alpha", "temperature", helps=helps)
    for group, flag, help in (
        (study, "--scale", "factor on the channel counts of all networks, or several factors (default: 1)"),
        (comparisons, "--alphas", "weights of the distillation of I+D in figure4 (default: 0.25,0.5,0.75)"),
        (comparisons, "--widths", "widths of the one network in figure5, relative to the members (default: 0.5,1,2)"),
    ):
        group.add_argument(flag, type=options.distinct_floats, metavar="F,F,...", help=help)
    config_options.add_options(parser.add_argument_group("optimisation"), *config_options.OPTIMISATION)
    config_options.add_options(parser.add_argument_group("numerics"), *config_options.NUMERICS)
    options.add_computing(parser)


def execute(args: argparse.Namespace) -> int:
    """Train the missing runs, and report."""
    given = config_options.given_options(args)
    base = TrainConfig.of(**{name: value for name, value in given.items() if name not in _DEFAULTS})  # not --widths
    out = args.out or Path("runs") / f"study-{base.data}-{base.preset}"
    folder = args.runs or out / "runs"
    settings = StudySettings(base, args.objectives, args.alphas, args.widths)
    studies = {name: study_panels(STUDIES[name], settings, args.scale) for name in dict.fromkeys(args.studies)}
    configs = training_configs((panel for panels in studies.values() for panel in panels), args.seeds)
    with options.computing(args), join_world(choose_device(args.device)) as world:
        dataset = load_training_data(args, base)
        if dataset.target is not None:
            raise ValueError(f"data: expected a data set with classes, as the paper's are, got {base.data}")
        macs = macs_per_epoch(configs, dataset)
        states = {config: read_run_state(folder / run_name(config), config, dataset) for config in configs}
        if world.main and not args.quiet:
            _introduce(base, dataset, world, states, out)
        failures: list[str] = []
        if not args.dry_run:
            failures = _train_missing(states, macs, dataset, world, folder, args)
        elif world.main:
            _list_runs(states, macs)
        if world.main:
            about = _about(base, dataset, args)
            for name, panels in studies.items():
                results = collect_results(panels, args.seeds, lambda config: states[config].evaluation)
                text = about
                if STUDIES[name].timed:
                    results = with_times(results, folder, dataset, rounds=args.rounds)
                    turns = f"medians of {args.rounds} turns: {machine_line()}."
                    text += f"\n\nTimes are of the models of the first seed, for one image, {turns}"
                _report(name, panels, results, states, out, f"{base.preset} on {base.data}", text, args)
    if failures:
        raise TrainingError(f"{len(failures)} of {len(states)} runs failed: {'; '.join(failures)}")
    return 0


def _introduce(
    base: TrainConfig, dataset: Dataset, world: World, states: Mapping[TrainConfig, RunState], out: Path
) -> None:
    """Print the size of the study and how far it is."""
    done = sum(state.evaluation is not None for state in states.values())
    begun = sum(state.epochs > 0 and state.evaluation is None for state in states.values())
    print(
        f"{base.preset} on {base.data}: {image_counts(dataset)}, "
        f"{config_options.protocol_line(base.to_dict())}\n"
        f"{len(states)} runs: {done} finished, {begun} begun, {len(states) - done - begun} to start; "
        f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); results in {out}",
        flush=True,
    )


def _list_runs(states: Mapping[TrainConfig, RunState], macs: Mapping[TrainConfig, int]) -> None:
    """Print the runs, their states and their remaining multiply-adds."""
    left = {config: macs[config] * (config.epochs - state.epochs) for config, state in states.items()}
    rows = [
        (
            run_name(config),
            f"{state.epochs}/{config.epochs}",
            "finished" if state.evaluation else "begun" if state.epochs else "to start",
            f"{left[config] / 1e12:.3f} T",
        )
        for config, state in states.items()
    ]
    total = f"{sum(left.values()) / 1e12:.3f} T multiply-adds of forward passes to go (training: three times that)"
    show_table(["run", "epochs", "state", "to go"], rows, caption=total, text_columns=3)


def _train_missing(
    states: dict[TrainConfig, RunState],
    macs: Mapping[TrainConfig, int],
    dataset: Dataset,
    world: World,
    folder: Path,
    args: argparse.Namespace,
) -> list[str]:
    """Train the runs that are not finished and that no other process trains, and update ``states``.

    Returns:
        Name and error of each run that failed.
    """
    missing = [config for config, state in states.items() if state.evaluation is None]
    epochs = {config: states[config].epochs for config in missing}
    reporter = _Reporter(not world.main or args.quiet, macs, epochs)
    runs = train_runs(
        {folder / run_name(config): config for config in missing},
        lambda config: study_trainer(config, dataset, world),
        reporter,
        resume=True,
        eval_every=max((config.epochs for config in missing), default=1),  # at the end only
        quiet=args.quiet,
        share=True,
    )
    for _, trainer in runs:
        evaluation = final_evaluation(trainer)
        assert isinstance(evaluation, Evaluation)  # execute() refuses regressions
        states[trainer.config] = RunState(trainer.epoch, evaluation)
        del trainer  # frees its memory before the next run
    left = {config: read_run_state(folder / run_name(config), config, dataset) for config in reporter.left}
    states.update(left)
    busy = sum(state.evaluation is None for state in left.values())
    if busy:
        reporter.print(f"{busy} run(s) left to other processes: when those end, the same command completes the report")
    return reporter.failures


class _Reporter(ProgressReporter):
    """Goes on after a run that failed, or that another process trains."""

    def __init__(self, silent: bool, macs: Mapping[TrainConfig, int], epochs: Mapping[TrainConfig, int]) -> None:
        super().__init__(silent, macs, epochs)
        self.failures: list[str] = []
        self.left: list[TrainConfig] = []

    def failure(self, folder: Path, trainer: Trainer, error: TrainingError) -> None:
        self.failures.append(f"{folder.name}: {error}")
        self.skip(trainer.config)
        self.print(f"  failed: {error}")

    def locked(self, folder: Path, trainer: Trainer) -> None:
        self.left.append(trainer.config)
        self.skip(trainer.config)
        self.print(f"left to another process: {folder.name}")


def _report(
    name: str,
    panels: tuple[Panel, ...],
    results: tuple[PanelResult, ...],
    states: Mapping[TrainConfig, RunState],
    out: Path,
    subject: str,
    about: str,
    args: argparse.Namespace,
) -> None:
    """Print the tables of a study, and write its files."""
    study = STUDIES[name]
    configs = training_configs(panels, args.seeds)
    missing = sum(states[config].evaluation is None for config in configs)
    if missing == len(configs):
        print(f"{name}: nothing is finished yet")
        return
    if missing:
        about += f"\n\nPreliminary: {missing} of {len(configs)} runs are missing."
    command = _command(name, args)
    files = write_report(out, name, study, results, subject, f"{about}\n\n```sh\n{command}\n```")
    for panel in results:
        for table in panel_tables(study, panel):
            scale = f", width {panel.scale:g}" if len(results) > 1 else ""
            show_table(table.columns, table.rows, title=f"\n{name}: {table.title}{scale}", text_columns=1)
    print(f"\n{name}: wrote {', '.join(path.name for path in files)} to {out}", flush=True)


def _about(base: TrainConfig, dataset: Dataset, args: argparse.Namespace) -> str:
    """The setting of a study, for its report."""
    seeds = f"Mean ± standard deviation over {args.seeds} seeds" if args.seeds > 1 else "One seed"
    return (
        f"{seeds}; {image_counts(dataset)}, "
        f"{config_options.protocol_line(base.to_dict())}. Unless stated otherwise, objective {base.objective}, "
        f"alpha {base.alpha:g}, temperature {base.temperature:g}. Ensembles average logits."
    )


def _command(name: str, args: argparse.Namespace) -> str:
    """The command that repeats a study, without the paths and the options that change no result."""
    given = config_options.given_options(args) | {option: getattr(args, option) for option in _DEFAULTS}
    return shlex.join(["hne", "study", name, *config_options.as_flags(given, _DEFAULTS)])
