"""Systems side by side: how good, how diverse, how large and how fast each of them is."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, Images
from ..evaluation.classification import Evaluation, Foreign, evaluate, evaluate_foreign
from ..evaluation.latency import seconds_per_call
from ..evaluation.regression import RegressionEvaluation, evaluate_regression
from ..experiments.tables import Table
from ..files import replacing
from ..models.hne import HNE
from ..training.history import write_json

BATCHES = (1, 64)  # sizes of the batches that are timed


@dataclass(frozen=True)
class System:
    """A whole ensemble on a data set.

    Attributes:
        name: what it is called.
        num_models: members.
        evaluation: on the test images.
        foreign: on images from outside the distribution, if there are any.
        parameters: how many; None where only its outputs are known.
        milliseconds: for a batch of each of :data:`BATCHES`; none where only its outputs are known.
    """

    name: str
    num_models: int
    evaluation: Evaluation | RegressionEvaluation
    foreign: Foreign | None = None
    parameters: int | None = None
    milliseconds: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def measured(name: str, model: HNE, dataset: Dataset, foreign: Images | None = None, *, seconds: float = 0.5) -> System:
    """Evaluate a network and time it.

    Args:
        name: what it is called.
        model: is put into eval mode.
        dataset: its test images and their format, on the device of the model.
        foreign: images from outside the distribution in that format, on that device.
        seconds: time to spend on each timing at least.
    """
    model.eval()
    if dataset.target is not None:
        evaluation: Evaluation | RegressionEvaluation = evaluate_regression(model, dataset)
    else:
        evaluation = evaluate(model, dataset)
    found = None if foreign is None else evaluate_foreign(model, dataset, foreign)[-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    times = []
    for batch in BATCHES:
        images = dataset.input.normalise(dataset.test.pixels(torch.arange(batch) % len(dataset.test)))
        images = images.to(next(model.parameters()).device)

        @torch.inference_mode()
        def call(images: torch.Tensor = images) -> torch.Tensor:
            return model(images)

        times.append(1e3 * seconds_per_call(call, seconds))
    return System(name, model.num_models, evaluation, found, parameters, tuple(times))


def compared(systems: Sequence[System], title: str) -> Table:
    """The systems in a table, a row each; what is not known of one is left empty."""
    rows = [_row(system) for system in systems]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    cells = ((system.name, *(row[column] for column in columns)) for system, row in zip(systems, rows, strict=True))
    return Table(title, ("", *columns), tuple(cells))


def write_comparison(folder: Path, systems: Sequence[System], table: Table, about: str) -> tuple[Path, ...]:
    """Write the table for people (Markdown) and programs (CSV), and all figures (JSON); returns the files."""
    markdown, rows, values = (folder / f"comparison.{kind}" for kind in ("md", "csv", "json"))
    with replacing(markdown) as temporary:
        temporary.write_text(f"# {table.title}\n\n{about}\n\n{table.markdown()}")
    with replacing(rows) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("system", *table.columns[1:]), *table.rows])
    write_json(values, {"systems": [system.to_dict() for system in systems]})
    return markdown, rows, values


def _row(system: System) -> dict[str, str]:
    """The cells of a system by their columns."""
    whole = system.evaluation.ensembles[-1]
    cells = {"networks": str(system.num_models)}
    if isinstance(system.evaluation, RegressionEvaluation):
        e = system.evaluation.ensembles[-1]
        cells |= {"RMSE": f"{e.rmse:.2f}", "NLL": f"{e.nll:.4f}", "diversity": f"{e.diversity:.3g}"}
    else:
        c, f = system.evaluation.ensembles[-1], system.foreign
        cells |= {
            "accuracy (%)": f"{100 * c.accuracy:.2f}",
            "NLL": f"{c.nll:.4f}",
            "Brier": f"{c.brier:.4f}",
            "ECE": f"{c.ece:.4f}",
            "diversity": f"{c.diversity:.3f}",
            "disagreement (%)": f"{100 * c.disagreement:.2f}",
            "MI": f"{c.mutual_information:.4f}",
            "MI OOD": "" if f is None else f"{f.mutual_information:.4f}",
            "AUROC (%)": "" if f is None else f"{100 * f.by_entropy.auroc:.2f}",
            "AUROC of MI (%)": "" if f is None else f"{100 * f.by_mutual_information.auroc:.2f}",
        }
    known = system.parameters is not None
    times = system.milliseconds or ("",) * len(BATCHES)
    return cells | {
        "parameters": f"{system.parameters:,}" if known else "",
        "MACs (M)": f"{whole.macs / 1e6:.3g}" if known else "",
        **{f"ms for {b}": f"{t:.2f}" if t else "" for b, t in zip(BATCHES, times, strict=True)},
    }
