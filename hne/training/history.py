"""The history of a training run: a record per epoch, and the CSV log of all records."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation, RegressionEvaluation
from ..files import replacing_text


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes:
        epoch: Number of the epoch, from 1.
        lr: Learning rate of its first step.
        loss: Mean loss of its steps.
        seconds: Duration without the evaluation.
        images_per_second: Training images of all processes per second.
        evaluation: Evaluation after the epoch, if there was one.
    """

    epoch: int
    lr: float
    loss: float
    seconds: float
    images_per_second: float
    evaluation: Evaluation | RegressionEvaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochRecord:
        """The inverse of :meth:`to_dict`."""
        evaluation = values["evaluation"]
        if evaluation is not None:
            kind = RegressionEvaluation if "member_rmse" in evaluation else Evaluation
            evaluation = kind.from_dict(evaluation)
        return cls(**{**values, "evaluation": evaluation})


def write_log(path: Path, history: Sequence[EpochRecord]) -> None:
    """Write the whole history as CSV, so that a resumed run has every epoch once, whatever it had logged before."""
    rows = [_flatten(record) for record in history]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing_text(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flatten(record: EpochRecord) -> dict[str, Any]:
    values = {name: value for name, value in record.to_dict().items() if name != "evaluation"}
    return values if record.evaluation is None else {**values, **record.evaluation.columns()}
