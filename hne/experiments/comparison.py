"""Measurements of the systems of ``hne compare``, and their report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import Dataset, Images
from ..evaluation import Evaluation, OODEvaluation, alternating_seconds, evaluate, evaluate_ood
from ..files import make_folder, remove_leftovers, write_text
from ..models import HNE
from ..reporting import Table
from .figures import ACCURACY_AND_NLL, plot_against_cost
from .mc_dropout import MCDropout
from .results import CurveResult, Estimate, PanelResult, Result
from .systems import System
from .tables import accuracy_table, macs_table, quantity_table, write_csv

BATCH_SIZES = (1, 64)  # that are timed

Milliseconds = dict[str, tuple[Estimate, ...]]  # for each ensemble size, by quantity


@dataclass(frozen=True)
class Measurement:
    """The quality of the ensembles of all sizes of a system, for one seed; ``ood`` only with such images."""

    evaluation: Evaluation
    ood: tuple[OODEvaluation, ...] = ()


def measure_quality(system: System, model: HNE, dataset: Dataset, ood_images: Images | None) -> Measurement:
    """Evaluate the ensembles of 1, 2, 3, ... N members."""
    ensemble = system.ensemble(model)
    sizes = range(1, ensemble.num_models + 1)
    torch.manual_seed(system.config.seed)  # of dropout
    evaluation = evaluate(ensemble, dataset, sizes=sizes, average=system.average)
    if ood_images is None:
        return Measurement(evaluation)
    return Measurement(evaluation, evaluate_ood(ensemble, dataset, ood_images, sizes=sizes))


def measure_times(
    ensembles: Sequence[HNE | MCDropout], dataset: Dataset, *, rounds: int, min_seconds: float = 0.01
) -> list[Milliseconds]:
    """Median time of a call for each ensemble, each of its sizes and each of :data:`BATCH_SIZES`.

    All calls take turns. A call gives the members' logits.

    Args:
        ensembles: The ensembles, on one device; they are put into eval mode.
        dataset: Its test images are the input.
        rounds: Number of turns.
        min_seconds: Least time of a call in a turn, by repeating it.
    """

    @torch.inference_mode()
    def call(ensemble: HNE | MCDropout, images: Tensor, size: int) -> Tensor:
        logits: Tensor = ensemble(images, size)
        return logits

    device = next(ensembles[0].parameters()).device
    inputs = [first_images(dataset, count, device) for count in BATCH_SIZES]
    calls = [
        [functools.partial(call, ensemble, images, size) for size in range(1, ensemble.eval().num_models + 1)]
        for ensemble in ensembles
        for images in inputs
    ]
    times = iter(median_milliseconds(calls, rounds, min_seconds))
    return [{f"milliseconds_{count}": next(times) for count in BATCH_SIZES} for _ in ensembles]


def first_images(dataset: Dataset, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The first test images, as a model takes them; from the beginning again if there are fewer."""
    pixels = dataset.test.pixels(torch.arange(count) % len(dataset.test))
    return dataset.input.normalise(pixels.to(device))


def median_milliseconds(
    calls: Sequence[Sequence[Callable[[], object]]], rounds: int, min_seconds: float
) -> list[tuple[Estimate, ...]]:
    """Median time of each call of each group; all of them take turns (:func:`hne.evaluation.alternating_seconds`)."""
    seconds = iter(alternating_seconds([call for group in calls for call in group], rounds, min_seconds))
    return [tuple(Estimate.of([1e3 * next(seconds)]) for _ in group) for group in calls]


def comparison_panel(
    systems: Sequence[System], measurements: Sequence[Sequence[Measurement]], times: Sequence[Milliseconds]
) -> PanelResult:
    """The results of all systems.

    Args:
        systems: The systems.
        measurements: For each system, a measurement of each seed.
        times: For each system, its times.
    """
    curves = []
    for system, seeds, milliseconds in zip(systems, measurements, times, strict=True):
        more: Milliseconds = {}
        if seeds[0].ood:
            columns = zip(*(seed.ood for seed in seeds), strict=True)
            more["auroc"] = tuple(Estimate.of([ood.by_entropy.auroc for ood in column]) for column in columns)
        result = Result(system.label, system.config, tuple(seed.evaluation for seed in seeds), more | milliseconds)
        curves.append(CurveResult(system.kind, system.label, (result,)))
    return PanelResult(systems[0].config.width, tuple(curves))


def training_table(systems: Sequence[System]) -> Table:
    """What the training of each system is and costs."""
    rows = []
    for system in systems:
        config = system.config
        branches = ",".join(map(str, config.branches or ()))
        numbers = (str(config.epochs), f"{config.lr:g}", f"{system.cost / 1e12:.3g}")
        rows.append((system.label, branches, config.objective, *numbers))
    columns = ("", "branches", "objective", "epochs", "lr", "multiply-adds (T)")
    return Table("Last training run, and multiply-adds of all forward passes of training", columns, tuple(rows))


def comparison_tables(panel: PanelResult) -> tuple[Table, ...]:
    """A table for each quantity, with a column for each ensemble size."""
    results = panel.results
    tables = [
        accuracy_table(results),
        quantity_table("Negative log-likelihood (nats)", results, "nll", 4),
        quantity_table("Expected calibration error (%)", results, "ece", 2, 100),
    ]
    if "auroc" in results[0].more:
        title = "AUROC of the predictive entropy for out-of-distribution images (%)"
        tables.append(quantity_table(title, results, "auroc", 2, 100))
    tables.append(macs_table(results))
    tables += [
        quantity_table(f"Milliseconds for a batch of {count}", results, f"milliseconds_{count}", 2)
        for count in BATCH_SIZES
    ]
    return tuple(tables)


def write_comparison_report(
    folder: Path, panel: PanelResult, training: Table, title: str, about: str
) -> tuple[Path, ...]:
    """Write the report: ``compare.md``, ``.csv``, and the figure as ``.png`` and ``.svg``.

    Args:
        folder: Folder of the report; it is created if necessary.
        panel: The results.
        training: The table of :func:`training_table`.
        title: Heading.
        about: Paragraphs of Markdown below the heading.

    Returns:
        The files.
    """
    make_folder(folder)
    remove_leftovers(folder)
    markdown, values, image, drawing = (folder / f"compare.{kind}" for kind in ("md", "csv", "png", "svg"))
    for path in (image, drawing):
        plot_against_cost([panel], path, title, ACCURACY_AND_NLL)
    text = [f"# {title}\n", f"{about}\n", f"![Accuracy and NLL against cost]({image.name})\n"]
    for table in (training, *comparison_tables(panel)):
        text += [f"**{table.title}**\n", table.markdown()]
    write_text(markdown, "\n".join(text))
    write_csv(values, [panel])
    return markdown, values, image, drawing
