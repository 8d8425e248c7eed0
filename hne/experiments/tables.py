"""The tables of a study: for people (terminal, Markdown) and for programs (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..evaluation import EnsembleMetrics
from ..files import replacing
from .results import Estimate, PanelResult, Result


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        title: what it shows.
        columns: their heads; that of the first, which names the rows, is empty.
        rows: as wide as the columns.
        best: row and column of the cells that are the best of their column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """In Markdown, with the best in bold."""
        lines = [f"| {' | '.join(self.columns)} |", f"|---|{'---:|' * (len(self.columns) - 1)}"]
        for r, row in enumerate(self.rows):
            cells = (f"**{cell}**" if (r, c) in self.best else cell for c, cell in enumerate(row))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def accuracy(results: Sequence[Result]) -> Table:
    """Of every ensemble size; the best is told where all networks have the same price."""
    estimates = [result.of_ensembles("accuracy") for result in results]
    best = _best(estimates) if len({result.macs for result in results}) == 1 else frozenset()
    return _by_size("Accuracy (%)", results, [[_percent(e) for e in row] for row in estimates], best)


def diversity(results: Sequence[Result]) -> Table:
    """Of every ensemble of at least two."""
    results = [result for result in results if result.sizes != (1,)]
    cells = [["", *(e.format(3) for e in result.of_ensembles("diversity")[1:])] for result in results]
    return _by_size("Diversity (standard deviation of the logits over the networks)", results, cells)


def macs(results: Sequence[Result]) -> Table:
    """What every ensemble size costs; in one row if it is the same for all networks."""
    table = _by_size(
        "Cost of an image (million multiply-adds)",
        results,
        [[f"{macs / 1e6:.2f}" for macs in result.macs] for result in results],
    )
    costs = {row[1:] for row in table.rows}
    return table if len(costs) > 1 else Table(table.title, table.columns, (("all", *costs.pop()),))


def members(results: Sequence[Result]) -> Table:
    """The accuracy of every network by itself."""
    count = max(len(result.of_members()) for result in results)
    rows = tuple((result.label, *map(_percent, result.of_members())) for result in results)
    return Table("Accuracy of each network by itself (%)", ("", *map(str, range(1, count + 1))), rows)


TABLES = {"accuracy": accuracy, "diversity": diversity, "macs": macs, "members": members}


def _by_size(
    title: str,
    results: Sequence[Result],
    cells: Sequence[Sequence[str]],
    best: frozenset[tuple[int, int]] = frozenset(),
) -> Table:
    """Every network's own sizes put into the columns of all sizes."""
    sizes = sorted({n for result in results for n in result.sizes})
    rows = []
    for result, row in zip(results, cells, strict=True):
        own = dict(zip(result.sizes, row, strict=True))
        rows.append((result.label, *(own.get(n, "") for n in sizes)))
    return Table(title, ("", *(f"n = {n}" for n in sizes)), tuple(rows), best)


def _best(estimates: Sequence[Sequence[Estimate]]) -> frozenset[tuple[int, int]]:
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
    """Write every quantity of every network: a row for each ensemble size, whose index is n, and for the accuracy of
    each network by itself (``member_accuracy``, from 1)."""
    quantities = [field.name for field in fields(EnsembleMetrics) if field.name not in ("num_models", "macs")]
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for panel in panels:
            for result in panel.results:
                recipe = result.recipe
                branches = ".".join(map(str, recipe.branches or ()))
                head = (panel.scale, result.label, branches, recipe.objective, recipe.alpha, recipe.width)
                for what, index, cost, estimate in _quantities(result, quantities):
                    deviation = "" if estimate.deviation is None else f"{estimate.deviation:.6g}"
                    tail = (f"{estimate.mean:.6g}", deviation, len(result.evaluations))
                    writer.writerow((*head, what, index, cost, *tail))


def _quantities(result: Result, names: Iterable[str]) -> Iterable[tuple[str, int, int | str, Estimate]]:
    for name in names:
        for n, cost, estimate in zip(result.sizes, result.macs, result.of_ensembles(name), strict=True):
            yield name, n, cost, estimate
    for leaf, estimate in enumerate(result.of_members(), 1):
        yield "member_accuracy", leaf, "", estimate
