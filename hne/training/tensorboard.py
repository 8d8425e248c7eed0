"""Scalars of a training run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation
from ..extras import require
from .history import EpochRecord

FOLDER = "tensorboard"  # in the folder of a run


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        ModuleNotFoundError: It is not; the message names the extra.
    """
    require("tensorboard", "tensorboard")


def open_writer(folder: Path, epoch: int) -> Any:
    """A writer of event files below the folder of a run, which is resumed after ``epoch`` epochs.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter  # importing it takes a while

    return SummaryWriter(str(folder / FOLDER), purge_step=epoch + 1)  # later steps of an interrupted run are hidden


def write_scalars(add_scalar: Callable[[str, float, int], Any], record: EpochRecord) -> None:
    """Write the record of an epoch, step by step of the epochs.

    Args:
        add_scalar: Takes name, value and step; the method of a writer.
        record: The record. With an evaluation, each metric has a scalar for each ensemble size, ``accuracy/1`` and
            so on.
    """
    for name in ("loss", "lr", "images_per_second"):
        add_scalar(f"train/{name}", getattr(record, name), record.epoch)
    if record.evaluation is None:
        return
    metrics = ("accuracy", "nll", "ece") if isinstance(record.evaluation, Evaluation) else ("rmse", "nll")
    for ensemble in record.evaluation.ensembles:
        for metric in metrics:
            add_scalar(f"{metric}/{ensemble.num_models}", getattr(ensemble, metric), record.epoch)
    for name in ("member_accuracy", "member_rmse", "diversity"):
        value = record.evaluation.columns().get(name)
        if value is not None:
            add_scalar(f"ensemble/{name}", value, record.epoch)
