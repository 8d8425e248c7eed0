"""What a training run leaves behind: a CSV row per epoch and a JSON summary."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation, RegressionEvaluation
from ..files import replacing
from ..reporting import show_evaluation


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
    evaluation: Evaluation | RegressionEvaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        evaluation = values["evaluation"]
        if evaluation is not None:
            kind = RegressionEvaluation if "member_rmse" in evaluation else Evaluation
            evaluation = kind.from_dict(evaluation)
        return cls(**{**values, "evaluation": evaluation})


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
    return values if row.evaluation is None else {**values, **row.evaluation.columns()}


def show_row(row: Row, epochs: int) -> None:
    """Print how an epoch of ``epochs`` went."""
    print(
        f"epoch {row.epoch:{len(str(epochs))}}/{epochs}  loss {row.loss:.4f}  lr {row.lr:.4g}  "
        f"{row.images_per_second:.0f} img/s",
        flush=True,
    )
    if row.evaluation is not None and row.epoch < epochs:
        show_evaluation(row.evaluation)
