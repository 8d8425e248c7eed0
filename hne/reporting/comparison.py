"""Comparison of systems: quality, diversity, size and speed of each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, Images
from ..evaluation import (
    Evaluation,
    OODEvaluation,
    RegressionEvaluation,
    evaluate,
    evaluate_ood,
    evaluate_regression,
    seconds_per_call,
)
from ..files import replacing_text, write_json, write_text
from ..models import HNE
from .tables import Table

BATCH_SIZES = (1, 64)  # timed for every system


@dataclass(frozen=True)
class System:
    """Measurements of a whole ensemble on a data set.

    Attributes:
        name: name of the system.
        num_models: number of members.
        evaluation: on the test images.
        ood: on out-of-distribution images; None without such images.
        parameters: number of parameters; None where only the outputs are known.
        milliseconds: per call, for each of :data:`BATCH_SIZES`; empty where only the outputs are known.
    """

    name: str
    num_models: int
    evaluation: Evaluation | RegressionEvaluation
    ood: OODEvaluation | None = None
    parameters: int | None = None
    milliseconds: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON-able values."""
        return asdict(self)


def measure_system(
    name: str, model: HNE, dataset: Dataset, ood_images: Images | None = None, *, seconds: float = 0.5
) -> System:
    """Evaluate and time a network.

    Args:
        name: name of the system.
        model: is put into eval mode.
        dataset: provides the test images, on the device of the model, and their format.
        ood_images: out-of-distribution images in that format, on that device.
        seconds: least time to spend on each timing.
    """
    model.eval()
    if dataset.target is not None:
        evaluation: Evaluation | RegressionEvaluation = evaluate_regression(model, dataset)
    else:
        evaluation = evaluate(model, dataset)
    ood = None if ood_images is None else evaluate_ood(model, dataset, ood_images)[-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    times = []
    for size in BATCH_SIZES:
        images = dataset.input.normalise(dataset.test.pixels(torch.arange(size) % len(dataset.test)))
        images = images.to(next(model.parameters()).device)

        @torch.inference_mode()
        def call(images: torch.Tensor = images) -> torch.Tensor:
            return model(images)

        times.append(1e3 * seconds_per_call(call, seconds))
    return System(name, model.num_models, evaluation, ood, parameters, tuple(times))


def comparison_table(systems: Sequence[System], title: str) -> Table:
    """Put the systems into a table, one row each. Unknown cells stay empty; columns without any value are left out."""
    rows = [_cells(system) for system in systems]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    cells = ((system.name, *(row[column] for column in columns)) for system, row in zip(systems, rows, strict=True))
    return Table(title, ("", *columns), tuple(cells))


def write_comparison(folder: Path, systems: Sequence[System], table: Table, about: str) -> tuple[Path, ...]:
    """Write the table for people (Markdown) and programs (CSV), and all measurements (JSON); return the paths."""
    markdown, rows, values = (folder / f"comparison.{kind}" for kind in ("md", "csv", "json"))
    write_text(markdown, f"# {table.title}\n\n{about}\n\n{table.markdown()}")
    with replacing_text(rows) as file:
        csv.writer(file).writerows([("system", *table.columns[1:]), *table.rows])
    write_json(values, {"systems": [system.to_dict() for system in systems]})
    return markdown, rows, values


def _cells(system: System) -> dict[str, str]:
    """Format the cells of a system, by column."""
    whole = system.evaluation.ensembles[-1]
    cells = {"networks": str(system.num_models)}
    if isinstance(system.evaluation, RegressionEvaluation):
        e = system.evaluation.ensembles[-1]
        cells |= {"RMSE": f"{e.rmse:.2f}", "NLL": f"{e.nll:.4f}", "diversity": f"{e.diversity:.3g}"}
    else:
        c, ood = system.evaluation.ensembles[-1], system.ood
        cells |= {
            "accuracy (%)": f"{100 * c.accuracy:.2f}",
            "NLL": f"{c.nll:.4f}",
            "Brier": f"{c.brier:.4f}",
            "ECE": f"{c.ece:.4f}",
            "diversity": f"{c.diversity:.3f}",
            "disagreement (%)": f"{100 * c.disagreement:.2f}",
            "MI": f"{c.mutual_information:.4f}",
            "MI OOD": "" if ood is None else f"{ood.mutual_information:.4f}",
            "AUROC (%)": "" if ood is None else f"{100 * ood.by_entropy.auroc:.2f}",
            "AUROC of MI (%)": "" if ood is None else f"{100 * ood.by_mutual_information.auroc:.2f}",
        }
    known = system.parameters is not None
    times = system.milliseconds or ("",) * len(BATCH_SIZES)
    return cells | {
        "parameters": f"{system.parameters:,}" if known else "",
        "MACs (M)": f"{whole.macs / 1e6:.3g}" if known else "",
        **{f"ms for {b}": f"{t:.2f}" if t else "" for b, t in zip(BATCH_SIZES, times, strict=True)},
    }
