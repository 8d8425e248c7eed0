"""The figures of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from ..reporting import COST, HALO, log_cost_axis, new_figure, plain_text, save_figure, style_axes
from .results import CurveResult, Estimate, PanelResult, Result

# The colours of Okabe and Ito can be told apart by the colour-blind. The same network has the same colour in every
# figure: "I+HD" among the objectives and "HNE" among the systems are one network.
_BLUE, _GREEN, _VERMILLION, _GREY = "#0072B2", "#009E73", "#D55E00", "#555555"
_STYLES = {  # by kind of curve: colour and markers
    "I": (_GREY, "s"),
    "I+D": (_BLUE, "^vD"),
    "I+HD": (_VERMILLION, "o"),
    "HNE": (_VERMILLION, "o"),
    "independent": (_BLUE, "o"),
    "multi-branch": (_GREEN, "o"),
    "single": (_GREY, "D"),
    "continued": ("#000000", "D"),
    "MC dropout": ("#AA4499", "o"),
    "slimmable": (_GREEN, "D"),
    "exits": ("#AA4499", "o"),
    "MSDNet": ("#000000", "o"),
}
# By the quantities that a figure shows: the factor, and the label of the axis.
ACCURACY_AND_DIVERSITY = {
    "accuracy": (100, "test accuracy (%)"),
    "diversity": (1, "diversity (std. deviation of the logits)"),
}
ACCURACY = {"accuracy": ACCURACY_AND_DIVERSITY["accuracy"]}
ACCURACY_AND_NLL = {"accuracy": (100, "test accuracy (%)"), "nll": (1, "negative log-likelihood (nats)")}


class Cost(NamedTuple):
    """What an x-axis shows."""

    label: str
    of: Callable[[Result], Sequence[float]]  # for each ensemble size


MACS = Cost(COST, lambda result: [macs / 1e6 for macs in result.macs])
TIME = Cost("ms for one image", lambda result: [estimate.mean for estimate in result.of_ensembles("milliseconds")])
_LINE = 13  # typographic points between labels


def plot_against_cost(
    panels: Sequence[PanelResult],
    path: str | Path,
    title: str,
    quantities: Mapping[str, tuple[float, str]] = ACCURACY_AND_DIVERSITY,
    costs: Sequence[Cost] = (MACS,),
) -> None:
    """Plot two quantities against multiply-adds, or one quantity against two costs, side by side, a row for each panel.

    The x-axis names the ensemble sizes where all results of a panel have the same costs; elsewhere the markers do.

    Args:
        panels: Panels with at least one curve each.
        path: The file; its ending chooses the format.
        title: Title above the figure.
        quantities: The quantities, with factors and labels.
        costs: What the x-axes show.
    """
    figure = new_figure(11.5, 4.4 * len(panels))
    figure.set_layout_engine("constrained", w_pad=0.15)
    columns = list(product(costs, quantities.items()))
    same_cost = len(costs) == 1
    grid = figure.subplots(
        len(panels),
        len(columns),
        squeeze=False,
        sharex="row" if same_cost else "none",
        sharey="none" if same_cost else "row",
    )
    figure.suptitle(plain_text(title), parse_math=False)
    for panel, row in zip(panels, grid, strict=True):
        prefix = f"width {panel.scale:g}: " if len(panels) > 1 else ""
        for axes, (cost, (quantity, (factor, label))) in zip(row, columns, strict=True):
            _draw_against_cost(axes, panel, quantity, factor, cost)
            axes.set_ylabel(prefix + label)
            axes.set_xlabel(cost.label)
    save_figure(figure, path)


def plot_members(panels: Sequence[PanelResult], path: str | Path, title: str) -> None:
    """Plot the accuracy of ensembles as a curve over n and of each member as bars: a column for each curve.

    Args:
        panels: Panels with at least one curve each.
        path: The file; its ending chooses the format.
        title: Title above the figure.
    """
    columns = max(len(panel.curves) for panel in panels)
    figure = new_figure(1 + 3.4 * columns, 3.9 * len(panels))
    figure.suptitle(plain_text(title), parse_math=False)
    figure.supxlabel("bars: each network by itself;  curve: the ensemble of the first n", fontsize=10)
    grid = figure.subplots(len(panels), columns, sharey="row", squeeze=False)
    for panel, row in zip(panels, grid, strict=True):
        for axes in row[len(panel.curves) :]:
            axes.set_visible(False)
        for axes, (curve, color, marker) in zip(row, _styled(panel.curves), strict=False):
            _draw_members(axes, curve, color, marker)
        row[0].set_ylim(_limits(panel))
        prefix = f"width {panel.scale:g}: " if len(panels) > 1 else ""
        row[0].set_ylabel(prefix + "test accuracy (%)")
    save_figure(figure, path)


FIGURES: dict[str, Callable[[Sequence[PanelResult], Path, str], None]] = {
    "cost": plot_against_cost,
    "cost and time": partial(plot_against_cost, quantities=ACCURACY, costs=(MACS, TIME)),
    "members": plot_members,
}


# Parts ----------------------------------------------------------------------------------------------------------------


def _styled(curves: Sequence[CurveResult]) -> Iterator[tuple[CurveResult, str, str]]:
    """Each curve with its colour and marker. Curves of the same kind go from light to dark and differ in marker."""
    for curve in curves:
        color, markers = _STYLES[curve.kind]
        alike = [other for other in curves if other.kind == curve.kind]
        index = alike.index(curve)
        yield curve, _lighter(color, 0.75 * (1 - (index + 1) / len(alike))), markers[index % len(markers)]


def _lighter(color: str, share: float) -> str:
    red, green, blue = (channel + share * (1 - channel) for channel in to_rgb(color))
    return to_hex((red, green, blue))


class _Point(NamedTuple):
    cost: float
    value: float
    estimate: Estimate
    name: str  # ensemble size, or width where a curve compares widths


def _points(curve: CurveResult, quantity: str, factor: float, cost: Cost) -> list[_Point]:
    several = len(curve.results) > 1
    return [
        _Point(x, factor * e.mean, e, rf"$\times${result.width:g}" if several else str(n))
        for result in curve.results
        for n, x, e in zip(result.sizes, cost.of(result), result.of_ensembles(quantity), strict=True)
        if quantity != "diversity" or n > 1  # a single network has none
    ]


def _draw_against_cost(axes: Axes, panel: PanelResult, quantity: str, factor: float, cost: Cost) -> None:
    costs = {tuple(cost.of(result)): result.sizes for result in panel.results}
    values, sizes = next(iter(costs.items()))
    same_costs = len(costs) == 1
    ends: list[tuple[float, float, str, str]] = []
    for index, (curve, color, marker) in enumerate(_styled(panel.curves)):
        points = _points(curve, quantity, factor, cost)
        if not points:
            continue
        several = len(curve.results) > 1
        numbered = not (same_costs or several)
        # Points of the same cost are shifted a little, so that all error bars show.
        shift = (max(values) / min(values)) ** (0.012 * (index - (len(panel.curves) - 1) / 2)) if same_costs else 1
        level = 10 - index  # the first curve on top, each number above its marker
        axes.errorbar(
            [shift * point.cost for point in points],
            [point.value for point in points],
            _bars([point.estimate for point in points], factor),
            color=color,
            marker=marker,
            ls="--" if several else "-",
            lw=1.8,
            ms=11 if numbered else 6,
            capsize=2.5,
            elinewidth=1.2,
            zorder=level,
        )
        for point in points:
            if numbered:
                _annotate(
                    axes, point, (0, 0), ha="center", va="center_baseline", size=7, color="white", zorder=level + 0.5
                )
            elif several:
                _annotate(axes, point, (-5, 5), ha="right", size=8, color=color, zorder=level + 0.5)
        label = rf"{curve.label} ($\times$ width)" if several else curve.label
        ends.append((shift * points[-1].cost, points[-1].value, label, color))
    style_axes(axes)
    axes.margins(0.12, 0.08)
    if same_costs:
        log_cost_axis(axes, values)
        names = [f"{value:.{2 if value < 1 else 3}g}\nn={n}" for value, n in zip(values, sizes, strict=True)]
        axes.set_xticks(axes.get_xticks(), names, fontsize=8.5)
    else:
        log_cost_axis(axes, [])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    _label_ends(axes, ends)


def _annotate(axes: Axes, point: _Point, offset: tuple[float, float], **style: Any) -> None:
    """Write the name of a point at an offset in typographic points."""
    axes.annotate(point.name, (point.cost, point.value), xytext=offset, textcoords="offset points", **style)


def _draw_members(axes: Axes, curve: CurveResult, color: str, marker: str) -> None:
    (result,) = curve.results
    alone, ensembles = result.of_members(), result.of_ensembles("accuracy")
    leaves = range(1, len(alone) + 1)
    axes.bar(
        leaves,
        [100 * estimate.mean for estimate in alone],
        yerr=_bars(alone, 100),
        color=_lighter(color, 0.6),
        error_kw={"ecolor": _lighter(color, 0.25), "elinewidth": 1},
        capsize=2,
        width=0.75,
    )
    axes.errorbar(
        result.sizes,
        [100 * estimate.mean for estimate in ensembles],
        _bars(ensembles, 100),
        color=color,
        marker=marker,
        lw=1.8,
        ms=6,
        capsize=2.5,
    )
    axes.set_title(curve.label, color=color, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.3, len(alone) + 0.7)
    style_axes(axes)


def _limits(panel: PanelResult) -> tuple[float, float]:
    """Limits of the accuracy axis of a panel; above 0 at the bottom, so that differences of a per cent show."""
    estimates = [e for result in panel.results for e in (*result.of_members(), *result.of_ensembles("accuracy"))]
    low = min(100 * (e.mean - (e.deviation or 0)) for e in estimates)
    high = max(100 * (e.mean + (e.deviation or 0)) for e in estimates)
    margin = max(0.12 * (high - low), 0.1)
    return max(0, low - 2 * margin), high + margin


def _bars(estimates: Sequence[Estimate], factor: float) -> list[float] | None:
    """Error bars of one standard deviation; None without repetitions."""
    if any(estimate.deviation is None for estimate in estimates):
        return None
    return [factor * (estimate.deviation or 0) for estimate in estimates]


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label curves to the right of the plot, each at the height of its last point or as close as the others allow.

    Args:
        axes: The plot.
        ends: For each curve, x and y of its last point, label and colour.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)  # not a subfigure
    figure.draw_without_rendering()  # the layout engine fixes the positions here
    scale = 72 / figure.dpi
    heights = [scale * axes.transData.transform((x, y))[1] for x, y, _, _ in ends]
    bottom, top = (scale * edge for edge in axes.bbox.intervaly)
    for (x, y, label, color), height in zip(ends, _spread(heights, _LINE, top), strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, (height - bottom) / (top - bottom)),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=color,
            path_effects=HALO,
            zorder=2,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8, "alpha": 0.6, "shrinkA": 1, "shrinkB": 5},
        )


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move heights apart until neighbours differ by ``gap`` and none is above ``top``. Their order stays."""
    placed = sorted(heights)
    for _ in range(200):  # neighbours closer than the gap push each other away
        for low, high in pairwise(range(len(placed))):
            push = max(0.0, gap - (placed[high] - placed[low])) / 2
            placed[low] -= push
            placed[high] += push
        placed[-1:] = [min(top, last) for last in placed[-1:]]
    order = sorted(range(len(heights)), key=heights.__getitem__)
    return [placed[order.index(index)] for index in range(len(heights))]
