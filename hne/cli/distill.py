"""``hne distill``."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, Images, load_dataset, ood_images
from ..distributed import World, choose_device, join_world
from ..errors import DataError, TrainingError
from ..evaluation import evaluate_members
from ..models import checkpoint
from ..models.hne import HNE
from ..models.presets import PRESETS
from ..reporting import System, comparison_table, measure_system, show_table, write_comparison
from ..training.distillation import (
    Distillation,
    StudentRecipe,
    Teacher,
    check_outputs,
    expand,
    online,
    read_outputs,
    students,
    tabulate,
    tabulated,
)
from ..training.history import show_row
from ..training.run_directory import SUMMARY, train_into
from ..training.trainer import CHECKPOINT, Run
from .options import (
    Subparsers,
    add_computing,
    add_data,
    add_run,
    check_fits,
    checkpoint_path,
    computing,
    load_model,
    new_parser,
    progress_bar,
)
from .recipe_options import add, add_numerics, add_optimisation, add_training_data, given, protocol_line

_DESCRIPTION = """\
Distill an ensemble into Hydra (Tran et al. 2020): one network with a shared body and a head for each
member of the ensemble. Head i learns from member i: what is minimised is the mean over the heads of
the divergence KL(member i || head i) at temperature T, times T^2. So the student costs little more
than one network, and its heads still disagree, which tells what it does not know.

TEACHER is

  a run of `hne train`     any tree: `--branches N,N,...` makes independent networks
  outputs.npy              logits of N members for the training images in order, [N, images, classes]
  outputs.safetensors      the same as an array "train", and perhaps "test" for the table

The members are asked about the images as the student sees them, augmented; known logits, and
--no-augment, need the images as they are. Of a regression (diabetes), every member predicts a mean
and a variance, and the head matches them by the divergence of the Gaussians.

The folder --out gets a run for each network (hydra, and with the options below first-phase, distilled,
alone), each as `hne train` leaves it, and comparison.md, .csv and .json: how good, diverse, large and
fast they are beside their teacher. Times are those of a batch of 1 and of 64, on this machine.
"""
_EXAMPLES = """\
  hne train --branches 8,8,8,8 --objective I --out runs/teacher         independent networks
  hne distill runs/teacher --compare --ood fashion-mnist
  hne distill runs/teacher --own-blocks 1 --first-phase 10
  hne distill logits.npy --data digits --preset hne_tiny

  hne train --data diabetes --branches 8,8,8,8 --out runs/diabetes      a regression
  hne distill runs/diabetes --compare
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = new_parser(commands, "distill", "an ensemble in one network with many heads", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(run=run)
    parser.add_argument("teacher", type=Path, metavar="TEACHER", help="a run of `hne train`, or a file of logits")
    add_run(parser, out="runs/DATA-PRESET-hydra")
    _add_student(parser)
    add_data(parser, default="the teacher's")
    parser.add_argument(
        "--ood", metavar="DATA", help="compare on images from outside, too: a data set, or a folder (see `hne eval`)"
    )
    add_training_data(parser)
    add(add_optimisation(parser), "--seed", type=int, metavar="K", help="of weights, order and crops (default: 0)")
    add_computing(parser)
    add_numerics(parser)


def _add_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    add(group, "--preset", choices=tuple(PRESETS), help="the architecture (default: the teacher's)")
    add(group, "--width", type=float, metavar="F", help="factor on every channel count (default: the teacher's)")
    group.add_argument(
        "--own-blocks",
        type=int,
        metavar="K",
        default=0,
        help="last blocks that every head has for itself (default: 0, a head is a linear layer)",
    )
    add(group, "--temperature", type=float, metavar="T", help="of the distillation (default: 2)")
    group.add_argument(
        "--first-phase",
        type=int,
        metavar="K",
        default=0,
        help="for the first K epochs train one head on the members' average; then the heads start from it (default: 0)",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="train one network on the members' average (distilled) and one without teacher (alone), as long, too",
    )


@dataclass(frozen=True)
class _Source:
    """What is distilled.

    Attributes:
        path: the file.
        model, config: of a checkpoint.
        outputs: of a file of logits.
    """

    path: Path
    model: HNE | None
    config: dict[str, Any]
    outputs: dict[str, Tensor]

    @property
    def num_models(self) -> int:
        return len(self.outputs["train"]) if self.model is None else self.model.num_models


def run(args: argparse.Namespace) -> int:
    """Train the students, or continue to, and compare them."""
    with computing(args), join_world(choose_device(args.device)) as world:
        source = _source(args.teacher, world.device)
        base = _recipe(source, args)
        dataset = load_dataset(
            base.data,
            args.data_dir,
            image_size=base.image_size,
            limit_train=base.limit_train,
            limit_test=base.limit_test,
        )
        if source.model is not None:
            check_fits(source.path, source.config, dataset)
        check_outputs(source.path, source.outputs, dataset)
        foreign = _foreign(dataset, args)
        recipes = students(base, source.num_models, own_blocks=args.own_blocks, compare=args.compare)
        out = args.out or Path("runs") / f"{base.data}-{base.preset}-hydra"
        _prepare(out, recipes, world, args)
        if world.main and not args.quiet:
            _introduce(source, base, dataset, out)
        models = _train(recipes, dataset, world, _teacher(source, base, dataset, world.device, args), out, args)
        if world.main:
            _compare(source, models, base, dataset.to(world.device), foreign, out, args)
    return 0


def _source(path: Path, device: torch.device) -> _Source:
    """The teacher that a path names."""
    file = checkpoint_path(path)
    if path.is_dir() or checkpoint.is_checkpoint(file):
        return _Source(file, *load_model(file, device), {})
    if not file.is_file():
        raise DataError(f"{file}: no such file: expected a run of `hne train`, or a file of logits")
    return _Source(file, None, {}, read_outputs(file))


def _recipe(source: _Source, args: argparse.Namespace) -> StudentRecipe:
    """Hydra's recipe: what the user has given, completed by the teacher's data and network."""
    options = given(args)
    if source.model is not None:
        trained = source.config["recipe"]
        options.setdefault("data", trained["data"])
        options.setdefault("image_size", trained["image_size"])
        if options.setdefault("preset", trained["preset"]) == trained["preset"]:
            options.setdefault("width", trained["width"])
    elif "data" not in options:
        raise ValueError("--data: expected the data set that the logits are for, as a file does not say it")
    else:
        options["augment"] = False
    digest = hashlib.sha256(source.path.read_bytes()).hexdigest()[:16]
    return StudentRecipe.of(**options, teacher=f"sha256:{digest}", first_phase=args.first_phase)


def _foreign(dataset: Dataset, args: argparse.Namespace) -> Images | None:
    if args.ood is None:
        return None
    if dataset.target is not None:
        raise ValueError(f"--ood: expected with classes, whose entropy tells foreign images; {dataset.name} has none")
    return ood_images(args.ood, dataset.input, args.data_dir, limit=getattr(args, "limit_test", None))


def _teacher(
    source: _Source, base: StudentRecipe, dataset: Dataset, device: torch.device, args: argparse.Namespace
) -> Teacher:
    """Online where images are augmented; else its outputs are worked out once."""
    if source.model is None:
        return tabulated(source.outputs["train"].to(device))
    if base.augment:
        return online(source.model)
    with progress_bar(len(dataset.train), args) as bar:
        return tabulated(tabulate(source.model, dataset.train.to(device), dataset.input, progress=bar.update))


def _prepare(out: Path, recipes: dict[str, StudentRecipe], world: World, args: argparse.Namespace) -> None:
    """See to it that runs in the folder are continued or replaced only where that is asked for."""
    if any((out / name / CHECKPOINT).exists() for name in recipes) and not (args.resume or args.overwrite):
        raise TrainingError(
            f"{out} has runs already: --resume continues them, --overwrite replaces them, --out names another folder"
        )
    if args.overwrite and world.main:
        for name in recipes:
            for file in (CHECKPOINT, SUMMARY):
                (out / name / file).unlink(missing_ok=True)


def _introduce(source: _Source, base: StudentRecipe, dataset: Dataset, out: Path) -> None:
    """Say what is about to happen."""
    print(
        f"teacher {source.path}: {source.num_models} members\n"
        f"student {base.preset}, {base.data}: {len(dataset.train)} training and {len(dataset.test)} test images\n"
        f"temperature {base.temperature:g}, protocol {base.protocol}: {protocol_line(base.to_dict())}\n"
        f"{torch.get_num_threads()} thread(s); results in {out}",
        flush=True,
    )


def _train(
    recipes: dict[str, StudentRecipe],
    dataset: Dataset,
    world: World,
    teacher: Teacher,
    out: Path,
    args: argparse.Namespace,
) -> dict[str, HNE]:
    """Train every student to the end; returns them by name."""
    models: dict[str, HNE] = {}
    talks = world.main and not args.quiet
    for name, recipe in recipes.items():
        path = out / name / CHECKPOINT
        training = Distillation(recipe, dataset, world, teacher) if recipe.teacher else Run(recipe, dataset, world)
        if args.resume and path.exists():
            training.restore(path)
        elif recipe.first_phase:
            expand(models["first-phase"], training.model)
        if talks:
            done = f", resumed after epoch {training.epoch}" if training.epoch else ""
            print(f"{name}: {training.model.num_models} model(s), {recipe.epochs} epochs{done}", flush=True)
        try:
            for row in train_into(
                path.parent,
                training,
                eval_every=args.eval_every,
                checkpoint_every=args.checkpoint_every,
                quiet=args.quiet,
            ):
                if talks:
                    show_row(row, recipe.epochs)
        except KeyboardInterrupt:
            if world.main:
                hint = f"`hne distill --resume --out {out}` with the same options continues after the last saved epoch"
                print(hint, file=sys.stderr)
            raise
        models[name] = training.model
    return models


def _compare(
    source: _Source,
    models: dict[str, HNE],
    base: StudentRecipe,
    dataset: Dataset,
    foreign: Images | None,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Evaluate and time the teacher and the students, and show and write the table."""
    device = next(models["hydra"].parameters()).device
    foreign = None if foreign is None else foreign.to(device)
    systems = [] if source.model is None else [measure_system("teacher", source.model, dataset, foreign)]
    if "test" in source.outputs and dataset.target is None:
        outputs = [(source.outputs["test"].to(device), dataset.test.labels)]
        evaluation = evaluate_members(outputs, source.num_models, lambda n: 0, World(device))
        systems.append(System("teacher", source.num_models, evaluation))
    systems += [
        measure_system(name, model, dataset, foreign) for name, model in models.items() if name != "first-phase"
    ]
    table = comparison_table(systems, f"Hydra: {base.preset} on {base.data}")
    phase = f", the first {base.first_phase} of Hydra's with one head" if base.first_phase else ""
    softened = f"; temperature {base.temperature:g}" if dataset.target is None else ""
    own = f"; every head has its own last {args.own_blocks} block(s)" if args.own_blocks else ""
    told = f" OOD images are those of {args.ood}, told by the predictive entropy or the MI." if foreign else ""
    about = (
        f"{len(dataset.train)} training and {len(dataset.test)} test images, {protocol_line(base.to_dict())}{phase}"
        f"{softened}{own}.{told} Milliseconds for a batch of 1 and of 64 on {device}, "
        f"{torch.get_num_threads()} thread(s)."
    )
    files = write_comparison(out, systems, table, about)
    show_table(table.columns, table.rows, title=table.title, caption=about, text_columns=1)
    print(f"wrote {', '.join(path.name for path in files)} to {out}")
