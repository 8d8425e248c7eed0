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
    RegressionMetrics,
    RegressionOODEvaluation,
    evaluate,
    evaluate_ood,
    evaluate_regression,
    evaluate_regression_ood,
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
    ood: OODEvaluation | RegressionOODEvaluation | None = None
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
    evaluation: Evaluation | RegressionEvaluation
    ood: OODEvaluation | RegressionOODEvaluation | None = None
    if dataset.target is None:
        evaluation = evaluate(model, dataset)
        if ood_images is not None:
            ood = evaluate_ood(model, dataset, ood_images)[-1]
    else:
        evaluation = evaluate_regression(model, dataset)
        if ood_images is not None:
            ood = evaluate_regression_ood(model, dataset, ood_images)[-1]
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
    longest = max(rows, key=len)  # a teacher whose outputs alone are known has fewer columns
    columns = [column for column in longest if any(row.get(column) for row in rows)]
    cells = (
        (system.name, *(row.get(column, "") for column in columns)) for system, row in zip(systems, rows, strict=True)
    )
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
    whole, ood = system.evaluation.ensembles[-1], system.ood
    cells = {"networks": str(system.num_models)}
    if isinstance(whole, RegressionMetrics):
        cells |= {
            "RMSE": f"{whole.rmse:.2f}",
            "NLL": f"{whole.nll:.4f}",
            "coverage error": f"{whole.coverage_error:.4f}",
            "diversity": f"{whole.diversity:.3g}",
        }
    else:
        cells |= {
            "accuracy (%)": f"{100 * whole.accuracy:.2f}",
            "NLL": f"{whole.nll:.4f}",
            "Brier": f"{whole.brier:.4f}",
            "ECE": f"{whole.ece:.4f}",
            "diversity": f"{whole.diversity:.3f}",
            "disagreement (%)": f"{100 * whole.disagreement:.2f}",
            "MI": f"{whole.mutual_information:.4f}",
        }
    if isinstance(ood, RegressionOODEvaluation):
        cells |= {
            "diversity OOD": f"{ood.diversity:.3g}",
            "AUROC (%)": f"{100 * ood.by_deviation.auroc:.2f}",
            "AUROC of diversity (%)": f"{100 * ood.by_diversity.auroc:.2f}",
        }
    elif ood is not None:
        cells |= {
            "MI OOD": f"{ood.mutual_information:.4f}",
            "AUROC (%)": f"{100 * ood.by_entropy.auroc:.2f}",
            "AUROC of MI (%)": f"{100 * ood.by_mutual_information.auroc:.2f}",
        }
    known = system.parameters is not None
    times = system.milliseconds or ("",) * len(BATCH_SIZES)
    return cells | {
        "parameters": f"{system.parameters:,}" if known else "",
        "MACs (M)": f"{whole.macs / 1e6:.3g}" if known else "",
        **{f"ms for {b}": f"{t:.2f}" if t else "" for b, t in zip(BATCH_SIZES, times, strict=True)},
    }
