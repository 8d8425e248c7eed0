"""Training runs of the commands train, study and distill: one function trains configs into their folders."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..distributed import World
from ..errors import FolderLockedError, TrainingError
from ..files import lock_folder
from ..reporting import show_evaluation
from ..training import (
    CHECKPOINT,
    EpochRecord,
    TrainConfig,
    Trainer,
    check_no_other_files,
    check_tensorboard,
    remove_run,
    train_into,
)
from .console import Terminated

Config = TypeVar("Config", bound=TrainConfig)


def check_unused(folders: Iterable[Path], args: argparse.Namespace) -> None:
    """Check that no folder has a run already, unless ``--resume`` or ``--overwrite`` is given.

    Raises:
        TrainingError: A folder has one, or other files with the names of a run's.
    """
    for folder in folders:
        if not args.resume and not args.overwrite:
            _check_no_run(folder)
        if not args.resume or not (folder / CHECKPOINT).exists():
            check_no_other_files(folder)


def _check_no_run(folder: Path) -> None:
    if (folder / CHECKPOINT).exists():
        raise TrainingError(
            f"{folder} has a run already: --resume continues it, --overwrite replaces it, --out names another folder"
        )


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`hne.cli.options.add_run`, as keyword arguments of :func:`train_runs`.

    Raises:
        ModuleNotFoundError: TensorBoard is wanted, and not installed.
    """
    if args.tensorboard:
        check_tensorboard()
    names = ("resume", "overwrite", "eval_every", "checkpoint_every", "quiet", "tensorboard")
    return {name: getattr(args, name) for name in names}


class RunReporter:
    """Prints how training runs proceed.

    Args:
        silent: Print nothing.
    """

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def start(self, folder: Path, trainer: Trainer) -> None:
        """Called before the first epoch of a run."""

    def epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        """Called after each epoch."""
        if not self.silent:
            show_epoch(record, trainer.config.epochs)

    def failure(self, folder: Path, trainer: Trainer, error: TrainingError) -> None:
        """Called when a run fails. Raises the error again; a subclass may go on with the next run instead."""
        raise error

    def locked(self, folder: Path, trainer: Trainer) -> None:
        """Called when another process trains the run, which is then left to it."""


class ProgressReporter(RunReporter):
    """Prints the name of each run, and estimates the remaining time of all.

    Args:
        silent: Print nothing.
        macs: Multiply-adds of an epoch, for each run.
        epochs: Number of finished epochs of each run.
    """

    def __init__(self, silent: bool, macs: Mapping[TrainConfig, int], epochs: Mapping[TrainConfig, int]) -> None:
        super().__init__(silent)
        self._macs = macs
        self._left = {config: macs[config] * (config.epochs - count) for config, count in epochs.items()}
        self._runs = len(epochs)
        self._started = self._done = 0
        self._start_time = time.monotonic()

    def start(self, folder: Path, trainer: Trainer) -> None:
        self._started += 1
        config = trainer.config
        self._left[config] = self._macs[config] * (config.epochs - trainer.epoch)  # another process may have trained it
        finished = ": finished" if trainer.epoch == config.epochs else ""
        self.print(f"run {self._started}/{self._runs}  {folder.name}{finished}")

    def skip(self, config: TrainConfig) -> None:
        """Take a run, or what is left of it, out of the remaining time."""
        self._left[config] = 0

    def epoch(self, trainer: Trainer, record: EpochRecord) -> None:
        macs, epochs = self._macs[trainer.config], trainer.config.epochs
        self._done += macs
        self._left[trainer.config] -= macs
        left = (time.monotonic() - self._start_time) * sum(self._left.values()) / self._done
        self.print(
            f"  epoch {record.epoch:{len(str(epochs))}}/{epochs}  loss {record.loss:.4f}  "
            f"{record.images_per_second:.0f} img/s  {_duration(left)} left"
        )

    def print(self, text: str) -> None:
        """Print a line unless silent."""
        if not self.silent:
            print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def train_runs(
    configs: Mapping[Path, Config],
    make_trainer: Callable[[Config], Trainer],
    reporter: RunReporter,
    *,
    resume: bool,
    overwrite: bool = False,
    eval_every: int | None = None,
    checkpoint_every: int = 1,
    quiet: bool = False,
    tensorboard: bool = False,
    share: bool = False,
) -> Iterator[tuple[Path, Trainer]]:
    """Train each config in its folder, one after the other.

    Args:
        configs: Configs by folder.
        make_trainer: Makes the trainer of a config; called when its turn comes.
        reporter: Prints how the runs proceed.
        resume: Continue the runs that have a checkpoint.
        overwrite: Remove the runs of all folders, once the first trainer could be made.
        eval_every: See :func:`hne.training.train_into`.
        checkpoint_every: Likewise.
        quiet: Likewise.
        tensorboard: Likewise.
        share: Leave a run that another process trains to it. Otherwise it is an error.

    Yields:
        Folder and trainer of each finished run, but for those left to other processes.

    Raises:
        FolderLockedError: Another process trains a run, without ``share``.
    """
    for folder, config in configs.items():
        trainer = make_trainer(config)
        path, main = folder / CHECKPOINT, trainer.world.main
        with ExitStack() as stack:
            locked = False
            try:
                if main:
                    stack.enter_context(lock_folder(folder))
            except FolderLockedError:
                if not share:
                    raise
                locked = True
            if trainer.world.sum(torch.tensor(float(locked), device=trainer.world.device)):
                reporter.locked(folder, trainer)
                continue
            if resume and path.exists():
                trainer.restore(path)
            if overwrite and main:
                for old in configs:
                    remove_run(old)
                overwrite = False
            if main and not resume:  # a run that ended while this one waited for its turn
                _check_no_run(folder)
            reporter.start(folder, trainer)
            try:
                for record in train_into(
                    folder,
                    trainer,
                    eval_every=eval_every,
                    checkpoint_every=checkpoint_every,
                    quiet=quiet,
                    tensorboard=tensorboard,
                ):
                    reporter.epoch(trainer, record)
            except TrainingError as error:
                reporter.failure(folder, trainer, error)
                continue
        yield folder, trainer


@contextmanager
def hint_on_interrupt(world: World, hint: str) -> Iterator[None]:
    """Print ``hint`` when the block is interrupted by the user, a signal, or the end of the output's reader."""
    try:
        yield
    except (KeyboardInterrupt, Terminated, BrokenPipeError):
        if world.main:
            with suppress(OSError):
                print(hint, file=sys.stderr, flush=True)
        raise


def show_epoch(record: EpochRecord, epochs: int) -> None:
    """Print the record of an epoch, and its evaluation unless it is the last."""
    print(
        f"epoch {record.epoch:{len(str(epochs))}}/{epochs}  loss {record.loss:.4f}  lr {record.lr:.4g}  "
        f"{record.images_per_second:.0f} img/s",
        flush=True,
    )
    if record.evaluation is not None and record.epoch < epochs:
        show_evaluation(record.evaluation)
