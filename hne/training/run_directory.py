"""The folder of a training run: checkpoint, log, summary and plot, up to date after every epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from hne_kernels import available_backends

from ..evaluation import Evaluation, RegressionEvaluation
from ..files import remove_leftovers
from ..reporting import plot_accuracy_against_macs
from .history import Row, write_csv, write_json
from .trainer import CHECKPOINT, Run, describe

LOG = "log.csv"
SUMMARY = "summary.json"
PLOT = "accuracy.png"


def train_into(
    folder: Path, run: Run, *, eval_every: int | None = None, checkpoint_every: int = 1, quiet: bool = False
) -> Iterator[Row]:
    """Train to the end; the files are there whenever a row is yielded, all of them after the last.

    Args:
        folder: is made if it is not there; what killed processes left half-written in it is removed.
        run: new, or restored from the checkpoint.
        eval_every: evaluate after so many epochs and the last one; about ten times by default.
        checkpoint_every: save after so many epochs and the last one.
        quiet: no progress bars.
    """
    main, epochs = run.world.main, run.recipe.epochs
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    for row in run.train(eval_every=eval_every or math.ceil(epochs / 10), quiet=quiet):
        if main:
            if row.epoch == epochs or row.epoch % checkpoint_every == 0:
                run.save(folder / CHECKPOINT)
            write_csv(folder / LOG, run.history)
        yield row
    if main:
        _finish(folder, run)


def final_evaluation(run: Run) -> Evaluation | RegressionEvaluation:
    """That of a run after its last epoch."""
    evaluation = run.history[-1].evaluation
    assert evaluation is not None  # the last epoch is always evaluated
    return evaluation


def title(run: Run) -> str:
    """What was trained, in a line."""
    return f"{run.recipe.preset} on {run.recipe.data}, {run.recipe.epochs} epochs"


def _finish(folder: Path, run: Run) -> None:
    """Write log, summary and (for a classification) plot, of a restored run once more. The summary comes last: a folder
    that has one is complete."""
    evaluation = final_evaluation(run)
    write_csv(folder / LOG, run.history)
    if isinstance(evaluation, Evaluation):
        plot_accuracy_against_macs({run.recipe.preset: evaluation}, folder / PLOT, title(run))
        single = {"mean_member_accuracy": evaluation.mean_member_accuracy}
    else:
        single = {"mean_member_rmse": evaluation.mean_member_rmse}
    write_json(
        folder / SUMMARY,
        {
            "recipe": run.recipe.to_dict(),
            "data": describe(run.dataset),
            "model": run.model.config(),
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "evaluation": evaluation.to_dict(),
            **single,
            "loss": run.history[-1].loss,
            "seconds": sum(row.seconds for row in run.history),
            "images_per_second": median(row.images_per_second for row in run.history),
            "environment": {
                "torch": torch.__version__,
                "device": str(run.world.device),
                "processes": run.world.size,
                "threads": torch.get_num_threads(),
                "backends": available_backends(),
            },
        },
    )
