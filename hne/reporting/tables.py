"""Tables on the terminal and in Markdown."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from ..evaluation import (
    CorruptionEvaluation,
    EnsembleMetrics,
    Evaluation,
    OODEvaluation,
    RegressionEvaluation,
    RegressionOODEvaluation,
    by_width,
    mean_metrics,
    pareto_front,
)
from ..metrics import Detection

_UNLIMITED = 1000  # width of a file or pipe: no line is wrapped


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: title of the table.
        columns: column heads; the first column names the rows and has an empty head.
        rows: cells, as many per row as there are columns.
        best: row and column of each cell that is the best of its column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """Format the table in Markdown, without its title, the best cells in bold."""
        lines = [f"| {' | '.join(self.columns)} |", f"|---|{'---:|' * (len(self.columns) - 1)}"]
        for r, row in enumerate(self.rows):
            cells = (f"**{cell}**" if (r, c) in self.best else cell for c, cell in enumerate(row))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    caption: str | None = None,
    text_columns: int = 0,
    left: Sequence[int] = (),
) -> None:
    """Print a table with aligned columns.

    Args:
        columns: their titles.
        rows: of cells, converted by ``str``.
        title: above the table.
        caption: below the table.
        text_columns: number of leading columns to align left; all others are aligned right.
        left: numbers of further columns to align left.
    """
    if sys.stdout is None:  # closed
        return
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns or index in left else "right")
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else _UNLIMITED
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    if title is not None:
        console.print(title, style="bold")
    console.print(table)
    if caption is not None:
        console.print(caption)


def show_evaluation(evaluation: Evaluation | RegressionEvaluation, title: str | None = None) -> None:
    """Print cost and quality of each ensemble."""
    if isinstance(evaluation, RegressionEvaluation):
        show_table(
            ["n", "MACs", "RMSE", "NLL", "coverage error", "diversity"],
            [
                (
                    e.num_models,
                    format_macs(e.macs),
                    f"{e.rmse:.4g}",
                    f"{e.nll:.4f}",
                    "" if e.coverage_error is None else f"{e.coverage_error:.4f}",
                    f"{e.diversity:.4g}",
                )
                for e in evaluation.ensembles
            ],
            title=title,
            caption=(
                f"one model by itself {evaluation.mean_member_rmse:.4g} (mean of {len(evaluation.member_rmse)}), "
                f"{evaluation.samples} samples"
            ),
        )
        return
    show_table(
        ["n", "MACs", "accuracy", "NLL"],
        [(e.num_models, format_macs(e.macs), f"{e.accuracy:.2%}", f"{e.nll:.4f}") for e in evaluation.ensembles],
        title=title,
        caption=(
            f"one model by itself {evaluation.mean_member_accuracy:.2%} (mean of "
            f"{len(evaluation.member_accuracy)}), diversity {evaluation.diversity:.3f}, "
            f"{evaluation.images} images, {mean_of(evaluation.average)}"
        ),
    )


def show_widths(evaluation: Evaluation, title: str | None = None) -> None:
    """Print cost and quality of each ensemble at each width of a slimmable model."""
    front = pareto_front(evaluation)
    show_table(
        ["width", "n", "MACs", "accuracy", "NLL", "Pareto"],
        [
            (
                f"{at.width:g}" if index == 0 else "",
                e.num_models,
                format_macs(e.macs),
                f"{e.accuracy:.2%}",
                f"{e.nll:.4f}",
                "*" if (at.width, e.num_models) in front else "",
            )
            for at in by_width(evaluation)
            for index, e in enumerate(at.ensembles)
        ],
        title=title,
        caption=(
            f"width: share of the channels; *: each cheaper choice of width and n is less accurate\n"
            f"{evaluation.images} images, {mean_of(evaluation.average)}"
        ),
    )


def mean_of(average: str) -> str:
    """What ensembles average, for the caption of a table."""
    return f"ensembles average {average}"


def show_uncertainty(evaluation: Evaluation, title: str | None = None) -> None:
    """Print calibration, diversity and uncertainty of each ensemble."""
    show_table(
        ["n", "Brier", "ECE", "diversity", "disagreement", "entropy", "MI"],
        [
            (
                e.num_models,
                f"{e.brier:.4f}",
                f"{e.ece:.4f}",
                f"{e.diversity:.3f}",
                f"{e.disagreement:.2%}",
                f"{e.entropy:.4f}",
                f"{e.mutual_information:.4f}",
            )
            for e in evaluation.ensembles
        ],
        title=title,
        caption=f"Brier, ECE: {mean_of(evaluation.average)}; entropy, MI: of the mean probabilities",
    )


def show_ood(ensembles: Sequence[OODEvaluation], title: str | None = None, *, average: str = "logits") -> None:
    """Print how well the scores of each ensemble detect out-of-distribution images; ``average`` as in their test."""
    scores = {
        "entropy": "by_entropy",
        "mutual information": "by_mutual_information",
        "max. probability": "by_max_probability",
        "max. logit": "by_max_logit",
        "energy": "by_energy",
    }
    rows = []
    for e in ensembles:
        means = {"entropy": f"{e.entropy:.4f}", "mutual information": f"{e.mutual_information:.4f}"}
        for score, name in scores.items():
            d = getattr(e, name)
            first = e.num_models if score == "entropy" else ""
            rows.append((first, score, means.get(score, ""), *_rates(d)))
    caption = (
        "mean: of the out-of-distribution images; mutual information is zero for a single member\n"
        f"max. probability: {mean_of(average)}; max. logit, energy: of the mean logits"
    )
    show_table(["n", "score", "mean (nats)", *_RATES], rows, title=title, caption=caption, left=(1,))


def show_regression_ood(ensembles: Sequence[RegressionOODEvaluation], title: str | None = None) -> None:
    """Print how well the deviations that each ensemble predicts detect out-of-distribution samples."""
    rows = [
        (first, score, f"{mean:.4g}", *_rates(d))
        for e in ensembles
        for first, score, mean, d in (
            (e.num_models, "deviation", e.deviation, e.by_deviation),
            ("", "diversity", e.diversity, e.by_diversity),
        )
    ]
    caption = (
        "mean: of the out-of-distribution samples, in the units of the target\n"
        "deviation: of the mixture; diversity: of the members' means, zero for a single member"
    )
    show_table(["n", "score", "mean", *_RATES], rows, title=title, caption=caption, left=(1,))


_RATES = ("AUROC", "AUPR", "FPR95")


def _rates(detection: Detection) -> tuple[str, ...]:
    """The cells of the columns :data:`_RATES`."""
    return f"{detection.auroc:.2%}", f"{detection.aupr:.2%}", f"{detection.fpr95:.2%}"


def show_corruptions(clean: Evaluation, corrupted: Sequence[CorruptionEvaluation], title: str | None = None) -> None:
    """Print the quality of each ensemble on corrupted images: for each corruption, and for each severity.

    Args:
        clean: on the images without corruption, for the same ensembles.
        corrupted: the evaluations, those of a corruption one after the other.
        title: above the first table.
    """
    average = mean_of(clean.average)
    by_name = [(name, [*group]) for name, group in itertools.groupby(corrupted, lambda found: found.corruption)]
    rows = [("none", clean.ensembles), *((name, mean_metrics(group)) for name, group in by_name)]
    severities = sorted({found.severity for found in corrupted})
    show_table(
        ["corruption", "n", "accuracy", "NLL", "ECE"],
        [
            (name if index == 0 else "", *_quality(ensemble))
            for name, ensembles in rows
            for index, ensemble in enumerate(ensembles)
        ],
        title=title,
        caption=f"means over severity {', '.join(map(str, severities))}; {average}",
        text_columns=1,
    )
    by_severity = [mean_metrics([found for found in corrupted if found.severity == s]) for s in severities]
    show_table(
        ["n", "none", *map(str, severities), "mean corruption error", "NLL", "ECE"],
        [
            (
                mean.num_models,
                *(f"{1 - e.accuracy:.2%}" for e in (without, *levels, mean)),
                f"{mean.nll:.4f}",
                f"{mean.ece:.4f}",
            )
            for without, mean, *levels in zip(clean.ensembles, mean_metrics(corrupted), *by_severity, strict=True)
        ],
        title="\nerror by severity",
        caption=f"means over {len(by_name)} corruptions, not relative to another network; {average}",
    )


def _quality(e: EnsembleMetrics) -> tuple[object, ...]:
    return e.num_models, f"{e.accuracy:.2%}", f"{e.nll:.4f}", f"{e.ece:.4f}"


def format_macs(macs: int) -> str:
    """Format multiply-adds in millions or thousands, with the unit."""
    return f"{macs / 1e6:.2f} M" if macs >= 1e5 else f"{macs / 1e3:.2f} k"
