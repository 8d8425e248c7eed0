"""``hne study``."""

from __future__ import annotations

import argparse
import math
import shlex
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..data import Dataset, load_dataset
from ..distributed import World, choose_device, join_world
from ..errors import TrainingError
from ..evaluation import Evaluation
from ..experiments import STUDIES, Panel, collect, panels, recipes
from ..experiments.designs import Choices
from ..experiments.report import tables, write_report
from ..experiments.runs import Progress, claimed, progress, run_name
from ..losses import OBJECTIVES, objective
from ..reporting import show_table
from ..training.config import Recipe
from ..training.run_directory import final_evaluation, train_into
from ..training.trainer import CHECKPOINT, Run
from .options import Subparsers, add_computing, add_data, add_quiet, computing, new_parser, positive
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
Repeat experiments of the HNE paper: train what they compare, over several seeds, and write the
table and the figure.

  table1    accuracy of the ensembles of 1, 2, 4, ... N networks, by objective: I, H, I+H, I+D, I+HD
  figure4   accuracy and diversity (standard deviation of the logits) against multiply-adds, by
            distillation: none (I), from the whole ensemble to each network (I+D, for each of
            --alphas), hierarchical (I+HD)
  figure5   the same, by what the networks share: the tree of an HNE, nothing, a trunk
            (multi-branch); and, to compare, one network at several --widths
  figure9   accuracy of the ensembles, and of each of their networks by itself: I, I+D, I+HD

Several may be named at once. Each goes to --out as NAME.md and NAME.csv (mean and standard
deviation over the seeds) and, but for table1, NAME.png and NAME.svg.

Every training run has a folder in --runs, named after its recipe. Studies share the runs that they
have in common; runs that are there are not trained again, and one that was interrupted goes on
after its last epoch. So the same command, given again, completes a study, and with other options
it trains only what these change. --dry-run shows what there is and what is missing.

--data, --epochs, --limit-train, --scale, --num-models and --seeds set the size. Without them, it is
the paper's protocol for the data set (quick for digits), at full width, with 3 seeds. --scale is a
factor on the channel counts of all networks, and costs (and times) go about with its square; 0.5
makes the paper's small networks. Several scales are reported side by side.
"""
_EXAMPLES = """\
  hne study table1                                          on digits: minutes on two cores
  hne study table1 figure4 figure5 figure9 --data fashion-mnist --preset hne_tiny --scale 0.5 \\
      --protocol quick --batch-size 32 --lr 0.2 --epochs 5 --limit-train 20000 --no-augment
  hne study table1 --data cifar100 --scale 1,0.5 --amp      the paper's protocol: for a GPU
  hne study figure4 --data cifar100 --scale 1,0.5 --amp --dry-run
"""
_DEFAULTS = {"scale": (1.0,), "seeds": 3, "alphas": Choices.alphas, "widths": Choices.widths}


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "study", "the paper's experiments", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("studies", nargs="+", choices=tuple(STUDIES), metavar="STUDY", help=", ".join(STUDIES))
    _add_study(parser)
    add_data(parser, default="digits")
    add_training_data(parser)
    add_network(parser)
    _add_objective(parser)
    add_optimisation(parser)
    add_computing(parser)
    add_numerics(parser)


def _add_study(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("study")
    group.add_argument("--out", type=Path, metavar="DIR", help="for the reports (default: runs/study-DATA-PRESET)")
    group.add_argument("--runs", type=Path, metavar="DIR", help="for the training runs (default: runs in --out)")
    group.add_argument(
        "--seeds",
        type=positive,
        metavar="K",
        default=_DEFAULTS["seeds"],
        help="train everything K times, with the seeds 0 to K - 1 (default: 3)",
    )
    group.add_argument(
        "--scale",
        type=_numbers,
        metavar="F,F,...",
        default=_DEFAULTS["scale"],
        help="factor on the channel counts of all networks, or several (default: 1)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: list the runs with their state, and report on those that are finished",
    )
    add_quiet(group)


def _add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparisons")
    add(group, "--objective", choices=OBJECTIVES, help="figure5: what its ensembles are trained for (default: I+HD)")
    add_distillation(group)
    group.add_argument(
        "--alphas",
        type=_numbers,
        metavar="A,A,...",
        default=_DEFAULTS["alphas"],
        help="figure4: weights of the distillation that I+D is tried with (default: 0.25,0.5,0.75)",
    )
    group.add_argument(
        "--widths",
        type=_numbers,
        metavar="F,F,...",
        default=_DEFAULTS["widths"],
        help="figure5: of the one network, in relation to those of the ensembles (default: 0.5,1,2)",
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing, and report."""
    base = Recipe.of(**given(args))
    out = args.out or Path("runs") / f"study-{base.data}-{base.preset}"
    folder = args.runs or out / "runs"
    choices = Choices(base, args.alphas, args.widths)
    compared = {name: panels(STUDIES[name], choices, args.scale) for name in dict.fromkeys(args.studies)}
    needed = recipes((panel for some in compared.values() for panel in some), args.seeds)
    with computing(args), join_world(choose_device(args.device)) as world:
        dataset = load_dataset(
            base.data,
            args.data_dir,
            image_size=base.image_size,
            limit_train=base.limit_train,
            limit_test=base.limit_test,
        )
        if dataset.target is not None:
            raise ValueError(f"data: expected a data set with classes, as the paper's are, got {base.data}")
        costs = _costs(needed, dataset)
        found = {recipe: progress(folder / run_name(recipe), recipe, dataset) for recipe in needed}
        if world.main and not args.quiet:
            _introduce(base, dataset, world, found, out)
        failures: list[str] = []
        if not args.dry_run:
            with claimed(folder) if world.main else nullcontext():
                failures = _train(found, costs, dataset, world, folder, quiet=args.quiet)
        elif world.main:
            _list(found, costs)
        if world.main:
            about = _about(base, dataset, args)
            for name, parts in compared.items():
                _report(name, parts, found, out, f"{base.preset} on {base.data}", about, args)
    if failures:
        raise TrainingError(f"{len(failures)} of {len(found)} runs failed: {'; '.join(failures)}")
    return 0


def _costs(needed: Iterable[Recipe], dataset: Dataset) -> dict[Recipe, int]:
    """Multiply-adds of an epoch's forward passes.

    Raises:
        ValueError: a recipe cannot be trained: better now than when its turn comes.
    """
    macs: dict[Recipe, int] = {}
    for recipe in needed:
        alike = replace(recipe, seed=0)
        if alike not in macs:
            objective(recipe.objective, recipe.alpha, recipe.temperature)
            with torch.device("meta"):  # shapes without memory
                macs[alike] = recipe.build_model(dataset).macs(input_size=dataset.input.size)
        macs[recipe] = macs[alike]
    return {recipe: macs[recipe] * len(dataset.train) for recipe in needed}


def _introduce(base: Recipe, dataset: Dataset, world: World, found: Mapping[Recipe, Progress], out: Path) -> None:
    """Say what is about to happen."""
    done = sum(state.evaluation is not None for state in found.values())
    begun = sum(state.epochs > 0 and state.evaluation is None for state in found.values())
    print(
        f"{base.preset} on {base.data}: {len(dataset.train)} training and {len(dataset.test)} test images, "
        f"{protocol_line(base.to_dict())}\n"
        f"{len(found)} runs: {done} finished, {begun} begun, {len(found) - done - begun} to start; "
        f"{world.size} process(es) on {world.device}, {torch.get_num_threads()} thread(s); results in {out}",
        flush=True,
    )


def _list(found: Mapping[Recipe, Progress], costs: Mapping[Recipe, int]) -> None:
    """Show the runs, their states, and what is left to do."""
    left = {recipe: costs[recipe] * (recipe.epochs - state.epochs) for recipe, state in found.items()}
    show_table(
        ["run", "epochs", "state", "to go"],
        [
            (
                run_name(recipe),
                f"{state.epochs}/{recipe.epochs}",
                "finished" if state.evaluation else "begun" if state.epochs else "to start",
                f"{left[recipe] / 1e12:.3f} T",
            )
            for recipe, state in found.items()
        ],
        caption=f"{sum(left.values()) / 1e12:.3f} T multiply-adds of forward passes to go (training: three times that)",
        text_columns=3,
    )


def _train(
    found: dict[Recipe, Progress],
    costs: Mapping[Recipe, int],
    dataset: Dataset,
    world: World,
    folder: Path,
    *,
    quiet: bool,
) -> list[str]:
    """Train what is not finished, and bring ``found`` up to date; returns which runs failed, and why."""
    talks = world.main and not quiet
    missing = [recipe for recipe, state in found.items() if state.evaluation is None]
    work = sum(costs[recipe] * (recipe.epochs - found[recipe].epochs) for recipe in missing)
    done, start = 0, time.monotonic()
    failures = []
    for number, recipe in enumerate(missing, 1):
        path = folder / run_name(recipe)
        training = Run(recipe, dataset, world)
        if (path / CHECKPOINT).exists():
            training.restore(path / CHECKPOINT)
        if talks:
            print(f"run {number}/{len(missing)}  {path.name}", flush=True)
        try:
            for row in train_into(path, training, eval_every=recipe.epochs, quiet=quiet):
                done += costs[recipe]
                if talks:
                    left = (time.monotonic() - start) * (work - done) / done
                    print(
                        f"  epoch {row.epoch:{len(str(recipe.epochs))}}/{recipe.epochs}  loss {row.loss:.4f}  "
                        f"{row.images_per_second:.0f} img/s  {_duration(left)} left",
                        flush=True,
                    )
        except TrainingError as error:  # the others may do better
            failures.append(f"{path.name}: {error}")
            work -= costs[recipe] * (recipe.epochs - training.epoch)
            if talks:
                print(f"  failed: {error}", flush=True)
        else:
            evaluation = final_evaluation(training)
            assert isinstance(evaluation, Evaluation)  # run() refuses regressions
            found[recipe] = Progress(training.epoch, evaluation)
    return failures


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _report(
    name: str,
    parts: tuple[Panel, ...],
    found: Mapping[Recipe, Progress],
    out: Path,
    what: str,
    about: str,
    args: argparse.Namespace,
) -> None:
    """Show the tables of a study, and write its files."""
    study = STUDIES[name]
    results = collect(parts, args.seeds, lambda recipe: found[recipe].evaluation)
    needed = recipes(parts, args.seeds)
    missing = sum(found[recipe].evaluation is None for recipe in needed)
    if missing == len(needed):
        print(f"{name}: nothing is finished yet")
        return
    if missing:
        about += f"\n\nPreliminary: {missing} of {len(needed)} runs are missing."
    command = _command(name, args)
    files = write_report(out, name, study, results, what, f"{about}\n\n```sh\n{command}\n```")
    for panel in results:
        for table in tables(study, panel):
            scale = f", width {panel.scale:g}" if len(results) > 1 else ""
            show_table(table.columns, table.rows, title=f"\n{name}: {table.title}{scale}", text_columns=1)
    print(f"\n{name}: wrote {', '.join(path.name for path in files)} to {out}", flush=True)


def _about(base: Recipe, dataset: Dataset, args: argparse.Namespace) -> str:
    """The setting of a study, for its report."""
    seeds = f"Mean ± standard deviation over {args.seeds} seeds" if args.seeds > 1 else "One seed"
    return (
        f"{seeds}; {len(dataset.train)} training and {len(dataset.test)} test images, {protocol_line(base.to_dict())}. "
        f"Where nothing else is said, objective {base.objective}, alpha {base.alpha:g}, "
        f"temperature {base.temperature:g}."
    )


def _command(name: str, args: argparse.Namespace) -> str:
    """The command that makes a study, without the paths."""
    words = ["hne", "study", name]
    options = given(args) | {option: getattr(args, option) for option in _DEFAULTS}
    for option, value in options.items():
        flag = option.replace("_", "-")
        if value is False:
            words.append(f"--no-{flag}")
        elif value is True:
            words.append(f"--{flag}")
        elif value != _DEFAULTS.get(option):
            text = ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
            words += [f"--{flag}", text]
    return shlex.join(words)


def _numbers(text: str) -> tuple[float, ...]:
    """Different numbers, at least 0, with commas between them, for argparse."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < math.inf for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers with commas between them, got {text!r}")
    return values
