"""What a training run leaves behind: a CSV row per epoch and a JSON summary."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .evaluation import Evaluation
from .files import replacing


@dataclass(frozen=True)
class Row:
    """One epoch.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its first step.
        loss: mean over its steps.
        seconds: time it took, without the evaluation.
        images_per_second: training images of all processes.
        evaluation: after it, if there was one.
    """

    epoch: int
    lr: float
    loss: float
    seconds: float
    images_per_second: float
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        evaluation = values["evaluation"]
        return cls(**{**values, "evaluation": evaluation and Evaluation.from_dict(evaluation)})


def write_csv(path: Path, history: Sequence[Row]) -> None:
    """Write the whole history: a resumed run has every epoch once, whatever an earlier one had
    logged.
    """
    flat = [_flatten(row) for row in history]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON that people read."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _flatten(row: Row) -> dict[str, Any]:
    values = {name: value for name, value in row.to_dict().items() if name != "evaluation"}
    if row.evaluation is not None:
        for ensemble in row.evaluation.ensembles:
            values[f"accuracy_{ensemble.num_models}"] = ensemble.accuracy
            values[f"nll_{ensemble.num_models}"] = ensemble.nll
        values["member_accuracy"] = row.evaluation.mean_member_accuracy
        values["diversity"] = row.evaluation.diversity
    return values
