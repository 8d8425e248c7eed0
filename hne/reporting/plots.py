"""Plots of accuracy against cost, and of accuracy against confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ..evaluation import AnytimeStep, Evaluation, by_width, pareto_front
from ..files import check_writable, replacing

HALO = [withStroke(linewidth=3, foreground="white")]  # keeps text legible over lines
COST = "cost per image (million multiply-adds)"


def plot_accuracy_against_macs(evaluations: Mapping[str, Evaluation], path: str | Path, title: str = "") -> None:
    """Plot accuracy against multiply-adds: one curve per evaluation, and a dashed line for its single members.

    Args:
        evaluations: by their names in the legend.
        path: of the file; its suffix chooses the format (png, svg, pdf).
        title: above the plot.
    """
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    curves: list[Line2D] = []
    for index, evaluation in enumerate(evaluations.values()):
        color = f"C{index}"
        macs = [ensemble.macs / 1e6 for ensemble in evaluation.ensembles]
        accuracy = [100 * ensemble.accuracy for ensemble in evaluation.ensembles]
        curves += axes.plot(macs, accuracy, "o-", color=color, lw=2, ms=6)
        single = 100 * evaluation.mean_member_accuracy
        axes.axhline(single, color=color, ls="--", lw=1.2, alpha=0.7)
        axes.annotate(
            "one model by itself (mean)",
            (1, single),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=color,
            path_effects=HALO,
        )
        label_sizes(axes, [ensemble.num_models for ensemble in evaluation.ensembles], macs, accuracy, color)
    ticks = sorted({e.macs / 1e6 for evaluation in evaluations.values() for e in evaluation.ensembles})
    log_cost_axis(axes, ticks if len(evaluations) == 1 else [ticks[0], ticks[-1]])
    axes.set_xlabel(COST)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(plain_text(title), parse_math=False)
    axes.margins(0.12, 0.16)
    style_axes(axes)
    if len(evaluations) > 1:
        # matplotlib leaves labels out that begin with an underscore, and takes $ for mathematics: set the texts later.
        legend = axes.legend(curves, ["name"] * len(curves), frameon=False)
        for text, name in zip(legend.get_texts(), evaluations, strict=True):
            text.set_parse_math(False)
            text.set_text(plain_text(name))
    save_figure(figure, path)


def plot_widths(evaluation: Evaluation, path: str | Path, title: str = "") -> None:
    """Plot accuracy against multiply-adds of a slimmable model: one curve per width, over the number of members.

    The line behind the curves joins the Pareto front over widths and members: choices that are more accurate than each
    cheaper one.

    Args:
        evaluation: from :func:`hne.evaluation.evaluate_widths`.
        path: of the file; its suffix chooses the format (png, svg, pdf).
        title: above the plot.
    """
    figure = new_figure(7.6, 4.8)
    axes = figure.add_subplot()
    evaluations = by_width(evaluation)
    front = pareto_front(evaluation)
    chosen = [e for at in evaluations for e in at.ensembles if (at.width, e.num_models) in front]
    macs, accuracy = zip(*sorted((e.macs / 1e6, 100 * e.accuracy) for e in chosen), strict=True)
    (line,) = axes.plot(macs, accuracy, color="0.85", lw=8, zorder=1.5, label="Pareto front")
    line.set_solid_capstyle("round")
    line.set_solid_joinstyle("round")
    colors = matplotlib.colormaps["viridis"](torch.linspace(0.8, 0.0, len(evaluations)).tolist())
    for at, color in zip(evaluations, colors, strict=True):
        costs = [e.macs / 1e6 for e in at.ensembles]
        percent = [100 * e.accuracy for e in at.ensembles]
        axes.plot(costs, percent, "o-", color=color, lw=2, ms=6, label=f"width {at.width:g}")
        sizes = [e.num_models for e in at.ensembles]
        label_sizes(axes, sizes, costs, percent, color, prefix="", offset=(0, 6), ha="center")
    costs = sorted(e.macs / 1e6 for at in evaluations for e in at.ensembles)
    log_cost_axis(axes, _log_ticks(costs, 7))
    axes.set_xlabel(COST)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(plain_text(title), parse_math=False)
    axes.margins(0.08, 0.14)
    style_axes(axes)
    axes.legend(frameon=False, loc="lower right", title="numbers: n, the networks")
    save_figure(figure, path)


def _log_ticks(costs: Sequence[float], count: int) -> list[float]:
    """Ticks on a logarithmic axis: at most ``count`` of the rising costs, the first and the last among them."""
    least = (costs[-1] / costs[0]) ** (1 / count)
    ticks = [costs[0]]
    for cost in costs[1:-1]:
        if cost > ticks[-1] * least and costs[-1] > cost * least:
            ticks.append(cost)
    return [*ticks, costs[-1]]


def plot_accuracy_against_time(steps: Sequence[AnytimeStep], path: str | Path, title: str = "") -> None:
    """Plot the accuracy of anytime inference against the time at which each step is done.

    Args:
        steps: from :func:`hne.evaluation.measure_anytime`.
        path: of the file; its suffix chooses the format (png, svg, pdf).
        title: above the plot.
    """
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    milliseconds = [step.milliseconds for step in steps]
    accuracy = [100 * step.accuracy for step in steps]
    axes.plot(milliseconds, accuracy, "o-", lw=2, ms=6, drawstyle="steps-post")  # an answer holds until the next one
    label_sizes(axes, [step.num_models for step in steps], milliseconds, accuracy, "C0")
    axes.set_xlabel("time until the answer is ready (ms, median)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(plain_text(title), fontsize=10, parse_math=False)
    axes.margins(0.12, 0.16)
    axes.set_xlim(left=0)
    style_axes(axes)
    save_figure(figure, path)


def plot_reliability(logits: Mapping[str, Tensor], target: Tensor, path: str | Path) -> None:
    """Plot how often predictions of each confidence are right; of calibrated ones, as often as they say.

    Each point is the mean of a tenth of the samples, ordered by confidence.

    Args:
        logits: ``[B, L]`` by name.
        target: classes ``[B]``.
        path: of the file; its suffix chooses the format (png, svg, pdf).
    """
    figure = new_figure(5.2, 4.6)
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], color="0.6", lw=1)
    lowest = 100.0
    for name, values in logits.items():
        confidence, label = values.double().softmax(-1).max(-1)
        order = confidence.argsort().cpu()
        right = (label == target).double().cpu()[order]
        parts = [(c, r) for c, r in zip(confidence.cpu()[order].chunk(10), right.chunk(10), strict=True) if len(c)]
        x = [100 * c.mean().item() for c, _ in parts]
        y = [100 * r.mean().item() for _, r in parts]
        axes.plot(x, y, "o-", lw=2, ms=6, label=name)
        lowest = min(lowest, *x, *y)
    axes.set_xlim(lowest - 2, 101)
    axes.set_ylim(lowest - 2, 101)
    axes.set_aspect("equal")
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, loc="upper left")
    style_axes(axes)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure; width and height in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def label_sizes(
    axes: Axes,
    sizes: Sequence[int],
    x: Sequence[float],
    y: Sequence[float],
    color: Any,
    *,
    prefix: str = "n = ",
    offset: tuple[float, float] = (7, -12),
    ha: Literal["left", "center"] = "left",
) -> None:
    """Write the ensemble size beside each point, at an offset in typographic points."""
    for size, right, up in zip(sizes, x, y, strict=True):
        axes.annotate(
            f"{prefix}{size}",
            (right, up),
            xytext=offset,
            textcoords="offset points",
            ha=ha,
            fontsize=9,
            color=color,
            path_effects=HALO,
        )


def log_cost_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """Make the x-axis logarithmic, with labels at ``ticks`` only."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def style_axes(axes: Axes) -> None:
    """Draw a light grid behind the curves, and no box around the plot."""
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix of ``path`` chooses the format. Equal figures give equal files."""
    path = Path(path)
    kind = _format(path)
    # No date and no random identifiers.
    metadata = {"Date": None} if kind in ("svg", "svgz") else None
    with matplotlib.rc_context({"svg.hashsalt": plain_text(path.stem)}), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)


def check_plot_path(path: Path) -> None:
    """Check that a figure can be written to ``path``, before the work that gives its content.

    Raises:
        ValueError: The suffix is of no format that matplotlib writes.
        FileError: The file cannot be written.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if _format(path) not in known:
        raise ValueError(f"{path}: expected a file name that ends in one of .{', .'.join(sorted(known))}")
    check_writable(path)


def plain_text(text: str) -> str:
    """The text with bytes of file names that are no UTF-8 as ``\\udcXX``, since fonts refuse them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _format(path: Path) -> str:
    """The format of a figure by the suffix of its file; png without one."""
    return path.suffix[1:].lower() or "png"
