"""``hne distill``."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch

from ..data import Dataset, Images
from ..distributed import World, choose_device, join_world
from ..evaluation import evaluate_members
from ..files import lock_folder
from ..models import HNE
from ..reporting import System, comparison_table, measure_system, show_table, write_comparison
from ..training import DistillationTrainer, StudentConfig, Trainer, expand_branches, student_configs
from . import config_options, options
from .loading import image_counts, load_ood_images, load_training_data
from .teacher_file import TeacherFile
from .training_runs import RunReporter, check_unused, hint_on_interrupt, run_options, train_runs

_DESCRIPTION = """\
Distill an ensemble into a Hydra (Tran et al. 2020): one network with a shared body and one head per
member of the ensemble. Head i learns from member i. The objective is the mean over the heads of the
divergence KL(member i || head i) at temperature T, times T^2. The student costs little more than a
single network, and its heads still disagree, which shows how uncertain it is.

TEACHER is

  a run of `hne train`     any tree: `--branches N,N,...` makes independent networks
  outputs.npy              logits of N members for the training images in order, [N, images, classes]
  outputs.safetensors      the same as an array "train", and perhaps "test" for the table

The teacher sees the images as the student does, augmented. Known logits, and --no-augment, are for
images without augmentation. In a regression (diabetes), every member predicts mean and variance,
and the head matches them by the divergence between Gaussians.

The folder --out gets a run for each network (hydra, and with the options below first-phase, distilled,
alone), like the runs of `hne train`, and comparison.md, .csv and .json: accuracy, diversity, size and
speed of the students and their teacher. Times are for batches of 1 and of 64 on this machine.
"""
_EXAMPLES = """\
  hne train --branches 8,8,8,8 --objective I --out runs/teacher         independent networks
  hne distill runs/teacher --compare --ood fashion-mnist
  hne distill runs/teacher --own-blocks 1 --first-phase 10
  hne distill logits.npy --data digits --preset hne_tiny

  hne train --data diabetes --branches 8,8,8,8 --out runs/diabetes      a regression
  hne distill runs/diabetes --compare --ood permuted
"""


def add_parser(commands: options.Subparsers) -> None:
    """Add the command to ``hne``."""
    parser = options.new_parser(commands, "distill", "distill an ensemble into a Hydra", _DESCRIPTION, _EXAMPLES)
    parser.set_defaults(execute=execute)
    parser.add_argument(
        "teacher", type=options.path, metavar="TEACHER", help="a run of `hne train`, or a file of logits"
    )
    options.add_run(parser, out="runs/DATA-PRESET-hydra")
    student = parser.add_argument_group("student")
    helps = {
        "preset": "architecture (default: the teacher's)",
        "width": "factor on every channel count (default: the teacher's)",
    }
    config_options.add_options(student, "preset", "width", "temperature", helps=helps)
    own_blocks = "number of last blocks that each head has for itself (default: 0, a head is a linear layer)"
    first_phase = (
        "for the first K epochs, train one head on the members' average; then all heads start from it (default: 0)"
    )
    for flag, help in (("--own-blocks", own_blocks), ("--first-phase", first_phase)):
        student.add_argument(flag, type=options.whole_number, metavar="K", default=0, help=help)
    compare = "also train one network on the members' average (distilled) and one without a teacher (alone), as long"
    student.add_argument("--compare", action="store_true", help=compare)
    options.add_data(parser, default="the teacher's")
    ood = (
        "compare on out-of-distribution images, too: a data set, or a folder of pictures; in a regression permuted or "
        "scaled (see `hne eval`)"
    )
    parser.add_argument("--ood", type=options.path_text, metavar="DATA", help=ood)
    for title, names in (
        ("training data", config_options.TRAINING_DATA),
        ("optimisation", (*config_options.OPTIMISATION, "seed")),
        ("numerics", config_options.NUMERICS),
        ("GPU", config_options.LAUNCHES),
    ):
        config_options.add_options(parser.add_argument_group(title), *names)
    options.add_computing(parser)


def execute(args: argparse.Namespace) -> int:
    """Train the students, or continue to train them, and compare them with the teacher."""
    with options.computing(args), join_world(choose_device(args.device)) as world:
        teacher = TeacherFile.open(args.teacher, world.device)
        base = teacher.student_config(config_options.given_options(args), args.first_phase)
        dataset = load_training_data(args, base)
        teacher.check_fits(dataset)
        ood_images = load_ood_images(args, dataset)
        configs = student_configs(base, teacher.num_models, own_blocks=args.own_blocks, compare=args.compare)
        out = args.out or Path("runs") / f"{base.data}-{base.preset}-hydra"
        check_unused([out / name for name in configs], args)
        if world.main and not args.quiet:
            _introduce(teacher, base, dataset, out)
        models = _train(configs, teacher, dataset, world, out, args)
        if world.main:
            _compare(teacher, models, base, dataset.to(world.device), ood_images, out, args)
    return 0


def _introduce(teacher: TeacherFile, base: StudentConfig, dataset: Dataset, out: Path) -> None:
    """Print teacher, student and data."""
    print(
        f"teacher {teacher.path}: {teacher.num_models} members\n"
        f"student {base.preset}, {base.data}: {image_counts(dataset)}\n"
        f"temperature {base.temperature:g}, protocol {base.protocol}: "
        f"{config_options.protocol_line(base.to_dict())}\n"
        f"{torch.get_num_threads()} thread(s); results in {out}",
        flush=True,
    )


def _train(
    configs: dict[str, StudentConfig],
    teacher: TeacherFile,
    dataset: Dataset,
    world: World,
    out: Path,
    args: argparse.Namespace,
) -> dict[str, HNE]:
    """Train every student to the end.

    Returns:
        The models by name.
    """
    teach = teacher.teacher(configs["hydra"], dataset, world.device, args)
    models: dict[str, HNE] = {}

    def make_trainer(config: StudentConfig) -> Trainer:
        if not config.teacher:
            return Trainer.from_config(config, dataset, world)
        trainer = DistillationTrainer.from_config(config, dataset, world, teacher=teach)
        if config.first_phase:
            expand_branches(models["first-phase"], trainer.model)
        return trainer

    runs = train_runs(
        {out / name: config for name, config in configs.items()},
        make_trainer,
        _Reporter(not world.main or args.quiet),
        **run_options(args),
    )
    hint = f"`hne distill --resume --out {out}` with the same options continues after the last saved epoch"
    with hint_on_interrupt(world, hint), lock_folder(out) if world.main else nullcontext():
        for folder, trainer in runs:
            models[folder.name] = trainer.model
    return models


class _Reporter(RunReporter):
    """Prints the name of each run before its first epoch."""

    def start(self, folder: Path, trainer: Trainer) -> None:
        if not self.silent:
            resumed = f", resumed after epoch {trainer.epoch}" if trainer.epoch else ""
            print(
                f"{folder.name}: {trainer.model.num_models} model(s), {trainer.config.epochs} epochs{resumed}",
                flush=True,
            )


def _compare(
    teacher: TeacherFile,
    models: dict[str, HNE],
    base: StudentConfig,
    dataset: Dataset,
    ood_images: Images | None,
    out: Path,
    args: argparse.Namespace,
) -> None:
    """Evaluate and time the teacher and the students; print and write the table."""
    device = next(models["hydra"].parameters()).device
    ood_images = None if ood_images is None else ood_images.to(device)
    systems = [] if teacher.model is None else [measure_system("teacher", teacher.model, dataset, ood_images)]
    if "test" in teacher.outputs and dataset.target is None:
        assert dataset.test.labels is not None  # known in data sets by name
        outputs = [(teacher.outputs["test"].to(device), dataset.test.labels)]
        evaluation = evaluate_members(outputs, teacher.num_models, lambda n: 0, World(device))
        systems.append(System("teacher", teacher.num_models, evaluation))
    systems += [
        measure_system(name, model, dataset, ood_images) for name, model in models.items() if name != "first-phase"
    ]
    table = comparison_table(systems, f"Hydra: {base.preset} on {base.data}")
    about = _about(base, dataset, device, args)
    files = write_comparison(out, systems, table, about)
    show_table(table.columns, table.rows, title=table.title, caption=about, text_columns=1)
    print(f"wrote {', '.join(path.name for path in files)} to {out}")


def _about(base: StudentConfig, dataset: Dataset, device: torch.device, args: argparse.Namespace) -> str:
    """The setting of the comparison, for its report."""
    first_phase = f", the first {base.first_phase} of Hydra's with one head" if base.first_phase else ""
    temperature = f"; temperature {base.temperature:g}" if dataset.target is None else ""
    own_blocks = f"; every head has its own last {args.own_blocks} block(s)" if args.own_blocks else ""
    if dataset.target is None:
        ood = f" OOD: images of {args.ood}, detected by the predictive entropy or the MI."
        average = " Ensembles average logits."
    else:
        ood = f" OOD: {args.ood} measurements, detected by the mixture's deviation or the diversity."
        average = " Ensembles are mixtures of Gaussians."
    return (
        f"{image_counts(dataset)}, "
        f"{config_options.protocol_line(base.to_dict())}{first_phase}{temperature}{own_blocks}."
        f"{ood if args.ood else ''}{average} "
        f"Milliseconds for a batch of 1 and of 64 on {device}, {torch.get_num_threads()} thread(s)."
    )
