"""Tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluation.classification import Evaluation, Foreign
from ..evaluation.regression import RegressionEvaluation
from ..training.history import Row

_UNLIMITED = 1000  # columns of a file or pipe: nothing is folded there


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    caption: str | None = None,
    text_columns: int = 0,
) -> None:
    """Print a table with aligned columns: the first ``text_columns`` to the left, numbers to the
    right.

    The title stands above it, the caption below.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right")
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else _UNLIMITED
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    if title is not None:
        console.print(title, style="bold")
    console.print(table)
    if caption is not None:
        console.print(caption)


def show_row(row: Row, epochs: int) -> None:
    """Print how an epoch of ``epochs`` went."""
    print(
        f"epoch {row.epoch:{len(str(epochs))}}/{epochs}  loss {row.loss:.4f}  lr {row.lr:.4g}  "
        f"{row.images_per_second:.0f} img/s",
        flush=True,
    )
    if row.evaluation is not None and row.epoch < epochs:
        show_evaluation(row.evaluation)


def show_evaluation(evaluation: Evaluation | RegressionEvaluation, title: str | None = None) -> None:
    """Print what each ensemble costs and how good it is."""
    if isinstance(evaluation, RegressionEvaluation):
        show_table(
            ["n", "MACs", "RMSE", "NLL", "diversity"],
            [
                (e.num_models, millions(e.macs), f"{e.rmse:.4g}", f"{e.nll:.4f}", f"{e.diversity:.4g}")
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
        [(e.num_models, millions(e.macs), f"{e.accuracy:.2%}", f"{e.nll:.4f}") for e in evaluation.ensembles],
        title=title,
        caption=(
            f"one model by itself {evaluation.mean_member_accuracy:.2%} (mean of "
            f"{len(evaluation.member_accuracy)}), diversity {evaluation.diversity:.3f}, "
            f"{evaluation.images} images"
        ),
    )


def show_uncertainty(evaluation: Evaluation, title: str | None = None) -> None:
    """Print how well each ensemble is calibrated, how different its members are and how uncertain."""
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
    )


def show_foreign(ensembles: Sequence[Foreign], title: str | None = None) -> None:
    """Print how uncertain each ensemble is about foreign images, and how well it tells them by that."""
    show_table(
        ["n", "entropy", "AUROC", "AUPR", "FPR95", "MI", "AUROC", "AUPR", "FPR95"],
        [
            (
                e.num_models,
                *(
                    figure
                    for score, d in ((e.entropy, e.by_entropy), (e.mutual_information, e.by_mutual_information))
                    for figure in (f"{score:.4f}", f"{d.auroc:.2%}", f"{d.aupr:.2%}", f"{d.fpr95:.2%}")
                ),
            )
            for e in ensembles
        ],
        title=title,
        caption="left: told by the entropy, right: by the mutual information (one network has none)",
    )


def millions(macs: int) -> str:
    """Multiply-adds with their unit."""
    return f"{macs / 1e6:.2f} M" if macs >= 1e5 else f"{macs / 1e3:.2f} k"
