"""The tables of a study: for people (terminal, Markdown) and for programs (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from ..evaluation import EnsembleMetrics
from ..files import replacing_text
from ..reporting import Table
from .results import Estimate, PanelResult, Result


def accuracy_table(results: Sequence[Result]) -> Table:
    """Accuracy of each ensemble size. The best are marked where all results have the same costs."""
    estimates = [result.of_ensembles("accuracy") for result in results]
    best = _best(estimates) if len({result.macs for result in results}) == 1 else frozenset()
    return _by_size("Accuracy (%)", results, [[_percent(e) for e in row] for row in estimates], best)


def diversity_table(results: Sequence[Result]) -> Table:
    """Diversity of each ensemble of at least two members."""
    results = [result for result in results if result.sizes != (1,)]
    cells = [["", *(e.format(3) for e in result.of_ensembles("diversity")[1:])] for result in results]
    return _by_size("Diversity (population standard deviation of the logits over the networks)", results, cells)


def macs_table(results: Sequence[Result]) -> Table:
    """Cost of each ensemble size, in a single row where all results have the same costs."""
    table = _by_size(
        "Cost of an image (million multiply-adds)",
        results,
        [[f"{macs / 1e6:.2f}" for macs in result.macs] for result in results],
    )
    costs = {row[1:] for row in table.rows}
    return table if len(costs) > 1 else Table(table.title, table.columns, (("all", *costs.pop()),))


def quantity_table(title: str, results: Sequence[Result], quantity: str, digits: int, factor: float = 1.0) -> Table:
    """Any quantity of each ensemble size."""
    cells = [[estimate.format(digits, factor) for estimate in result.of_ensembles(quantity)] for result in results]
    return _by_size(title, results, cells)


def members_table(results: Sequence[Result]) -> Table:
    """Accuracy of each member by itself."""
    count = max(len(result.of_members()) for result in results)
    rows = tuple((result.label, *map(_percent, result.of_members())) for result in results)
    return Table("Accuracy of each network by itself (%)", ("", *map(str, range(1, count + 1))), rows)


def times_table(results: Sequence[Result]) -> Table:
    """Time of each ensemble size."""
    return quantity_table("Time of a call for one image (ms)", results, "milliseconds", 3)


TABLES = {
    "accuracy": accuracy_table,
    "diversity": diversity_table,
    "macs": macs_table,
    "members": members_table,
    "milliseconds": times_table,
}


def _by_size(
    title: str,
    results: Sequence[Result],
    cells: Sequence[Sequence[str]],
    best: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    """A table with a column for every ensemble size that any result has.

    Args:
        title: Title of the table.
        results: The rows.
        cells: For each result, a cell for each of its own sizes.
        best: Row and column of the cells to mark.
    """
    sizes = sorted({n for result in results for n in result.sizes})
    rows = []
    for result, row in zip(results, cells, strict=True):
        by_size = dict(zip(result.sizes, row, strict=True))
        rows.append((result.label, *(by_size.get(n, "") for n in sizes)))
    return Table(title, ("", *(f"n = {n}" for n in sizes)), tuple(rows), best)


def _best(estimates: Sequence[Sequence[Estimate]]) -> frozenset[tuple[int, int]]:
    """Row and column of the highest mean of each column; column 0 holds the labels."""
    columns = zip(*estimates, strict=True)
    return frozenset(
        (max(range(len(column)), key=lambda row: column[row].mean), index) for index, column in enumerate(columns, 1)
    )


def _percent(estimate: Estimate) -> str:
    return estimate.format(2, 100)


_COLUMNS = (
    *("scale", "label", "branches", "objective", "alpha", "width"),
    *("quantity", "index", "macs", "mean", "deviation", "seeds"),
)


def write_csv(path: Path, panels: Iterable[PanelResult]) -> None:
    """Write every quantity of every result as CSV.

    The column ``index`` is the ensemble size n, or for ``member_accuracy`` the number of the member, from 1.
    """
    names = [field.name for field in fields(EnsembleMetrics) if field.name not in ("num_models", "macs")]
    with replacing_text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for panel in panels:
            for result in panel.results:
                config = result.config
                branches = ".".join(map(str, config.branches or ()))
                head = (panel.scale, result.label, branches, config.objective, config.alpha, result.width)
                for name, index, macs, estimate in _quantities(result, names):
                    deviation = "" if estimate.deviation is None else f"{estimate.deviation:.6g}"
                    tail = (f"{estimate.mean:.6g}", deviation, estimate.count)
                    writer.writerow((*head, name, index, macs, *tail))


def _quantities(result: Result, names: Iterable[str]) -> Iterable[tuple[str, int, int | str, Estimate]]:
    """Name, index, multiply-adds and estimate of every quantity."""
    for name in (*names, *result.more):
        for n, macs, estimate in zip(result.sizes, result.macs, result.of_ensembles(name), strict=True):
            yield name, n, macs, estimate
    for member, estimate in enumerate(result.of_members(), 1):
        yield "member_accuracy", member, "", estimate
