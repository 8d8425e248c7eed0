"""The folder of a training run: checkpoint, log, summary and plot, up to date after every epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

from hne_kernels import available_backends

from ..errors import TrainingError
from ..evaluation import Evaluation, RegressionEvaluation
from ..files import lock_folder, remove_leftovers, write_json
from ..models import checkpoint
from ..reporting import plot_accuracy_against_macs, plot_widths
from .history import EpochRecord, write_log
from .tensorboard import open_writer, write_scalars
from .trainer import Trainer, describe_dataset

CHECKPOINT = checkpoint.FILE_NAME
LOG = "log.csv"
SUMMARY = "summary.json"
PLOT = "accuracy.png"
RUN_FILES = (PLOT, CHECKPOINT, LOG, SUMMARY)


def train_into(
    folder: Path,
    trainer: Trainer,
    *,
    eval_every: int | None = None,
    checkpoint_every: int = 1,
    quiet: bool = False,
    tensorboard: bool = False,
) -> Iterator[EpochRecord]:
    """Train to the last epoch. Checkpoint and log are written before each record is yielded, all files before the last.

    The folder is locked until the iterator ends.

    Args:
        folder: Folder of the run. It is created, and temporary files of killed processes in it are removed.
        trainer: A new trainer, or one restored from a checkpoint.
        eval_every: Evaluate after this number of epochs and at the end; by default about ten times.
        checkpoint_every: Save after this number of epochs and at the end.
        quiet: Show no progress bars.
        tensorboard: Also write scalars for TensorBoard, into the folder ``tensorboard`` of the run.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        TrainingError: Another process or thread trains in the folder, or the training diverged.
        FileError: A file cannot be written.
    """
    main, epochs = trainer.world.main, trainer.config.epochs
    with lock_folder(folder, again=True) if main else nullcontext():
        if main:
            remove_leftovers(folder)
            if trainer.epoch == epochs:  # a finished run was restored
                _finish(folder, trainer)
        writer = open_writer(folder, trainer.epoch) if main and tensorboard else None
        for record in trainer.train(eval_every=eval_every or math.ceil(epochs / 10), quiet=quiet):
            if writer is not None:
                write_scalars(writer.add_scalar, record)
                writer.flush()
            if main:
                if record.epoch == epochs or record.epoch % checkpoint_every == 0:
                    trainer.save(folder / CHECKPOINT)
                if record.epoch == epochs:
                    _finish(folder, trainer)
                else:
                    write_log(folder / LOG, trainer.history)
            yield record


def check_no_other_files(folder: Path) -> None:
    """Check that a run in ``folder`` would replace only files of earlier runs.

    Raises:
        TrainingError: A file with a name of :data:`RUN_FILES` was not written by a training run.
    """
    for name, ours in ((CHECKPOINT, _is_checkpoint), (SUMMARY, _is_summary), (LOG, _is_log)):
        path = folder / name
        if path.exists() and not (path.is_file() and ours(path)):
            raise TrainingError(
                f"{path} was not written by a training run: remove or rename it, or name another folder by --out"
            )


def remove_run(folder: Path) -> None:
    """Remove the files that mark a run as begun or finished, so that a new one starts in the folder.

    Raises:
        TrainingError: One of them was not written by a training run.
    """
    check_no_other_files(folder)
    for name in (CHECKPOINT, SUMMARY):
        (folder / name).unlink(missing_ok=True)


def _is_checkpoint(path: Path) -> bool:
    return path.stat().st_size == 0 or checkpoint.is_checkpoint(path)


def _is_summary(path: Path) -> bool:
    try:
        return {"recipe", "evaluation"} <= json.loads(path.read_text("utf-8")).keys()
    except (ValueError, AttributeError):
        return False


def _is_log(path: Path) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith("epoch,lr,loss,seconds,")


def final_evaluation(trainer: Trainer) -> Evaluation | RegressionEvaluation:
    """The evaluation of a finished run."""
    evaluation = trainer.history[-1].evaluation
    assert evaluation is not None  # the last epoch is always evaluated
    return evaluation


def run_title(trainer: Trainer) -> str:
    """Preset, data set and number of epochs in a line."""
    config = trainer.config
    return f"{config.preset} on {config.data}, {config.epochs} epochs"


def _finish(folder: Path, trainer: Trainer) -> None:
    """Write the log, the plot (of a classification) and the summary, also where a finished run was restored.

    The summary comes last: a folder with a summary is complete.
    """
    evaluation = final_evaluation(trainer)
    write_log(folder / LOG, trainer.history)
    if isinstance(evaluation, Evaluation):
        if evaluation.narrower:
            plot_widths(evaluation, folder / PLOT, run_title(trainer))
        else:
            plot_accuracy_against_macs({trainer.config.preset: evaluation}, folder / PLOT, run_title(trainer))
        single = {"mean_member_accuracy": evaluation.mean_member_accuracy}
    else:
        single = {"mean_member_rmse": evaluation.mean_member_rmse}
    write_json(
        folder / SUMMARY,
        {
            "recipe": trainer.config.to_dict(),
            "data": describe_dataset(trainer.dataset),
            "model": trainer.model.config(),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "evaluation": evaluation.to_dict(),
            **single,
            "loss": trainer.history[-1].loss,
            "seconds": sum(record.seconds for record in trainer.history),
            "images_per_second": median(record.images_per_second for record in trainer.history),
            "environment": {
                "torch": torch.__version__,
                "device": str(trainer.world.device),
                "processes": trainer.world.size,
                "threads": torch.get_num_threads(),
                "backends": available_backends(),
            },
        },
    )
