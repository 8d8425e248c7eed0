"""Plot time per image against ensemble size.

``plot.py NAME.json`` draws NAME-NETWORK.png and .svg for every network whose inference was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from comparison import Row
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from table import TITLES, read_rows

from hne.files import replacing

# The palette of Okabe and Ito, distinguishable with colour blindness; naive sides are grey.
COLORS = {
    "fused": "#D55E00",
    "onnxruntime": "#0072B2",
    "openvino": "#009E73",
    "frozen": "#CC79A7",
    "naive": "#999999",
    "eager": "#444444",
    "channels_last": "#009E73",
    "compiled": "#CC79A7",
    "channels_last_compiled": "#0072B2",
    "cuda": "#D55E00",
    "triton": "#E69F00",
}
MARKERS = {"fused": "o", "onnxruntime": "s", "openvino": "D", "frozen": "^", "naive": "v", "cuda": "o", "triton": "o"}
_FACTS = ("cpu", "gpu", "threads", "torch", "commit", "date")


def time_per_image(rows: Sequence[Row], machine: dict[str, str]) -> Figure:
    """Plot the inference rows of one network: a panel per batch size, a line per system, and the lower bound."""
    batches = sorted({row.case["batch"] for row in rows})
    figure = Figure(figsize=(1.2 + 3 * len(batches), 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for batch, axes in zip(batches, panels, strict=True):
        _panel(axes, sorted((row for row in rows if row.case["batch"] == batch), key=_num_models))
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xlabel("networks evaluated")
    panels[0].set_ylabel("milliseconds per image")
    seen = [y for axes in panels for line in axes.get_lines() for y in np.asarray(line.get_ydata())]
    panels[0].set_ylim(0.8 * min(seen), 1.2 * max(seen))
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    columns = -(-len(lines) // (1 if len(batches) > 2 else 2))
    legend = figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    legend.set_title("; ".join(f"{name} {machine[name]}" for name in _FACTS if name in machine), {"size": 7})
    legend.get_title().set_color("#777777")
    dtype = "" if rows[0].case["dtype"] == "float32" else f", {rows[0].case['dtype']}"
    title = f"{rows[0].case['network']}: time of the first n networks{dtype}"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _num_models(row: Row) -> int:
    return row.case["num_models"]


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    batch = rows[0].case["batch"]
    backends = {row.backend: [r for r in rows if r.backend == row.backend] for row in rows}
    rows = next(iter(backends.values()))  # all backends have the same peers
    n = [row.case["num_models"] for row in rows]

    def draw(side: str, title: str, ms: Iterable[float | None]) -> None:
        points = [(x, y / batch) for x, y in zip(n, ms, strict=True) if y is not None]
        ours = side == "fused" or side in backends
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS.get(side, "x"),
            color=COLORS.get(side, "black"),
            lw=2.6 if ours else 1.5,
            ms=6.5 if ours else 4.5,
            zorder=3 if ours else 2,
            label=title,
        )

    for backend, theirs in backends.items():
        title = f"this package, {backend}" if len(backends) > 1 else "this package"
        draw(backend if len(backends) > 1 else "fused", title, (row.fused_ms for row in theirs))
    for side in dict.fromkeys(side for row in rows for side in row.others_ms):
        draw(side, TITLES.get(side, side), (row.others_ms.get(side) for row in rows))
    draw("naive", "naive (PyTorch)", (row.naive_ms for row in rows))
    if all(row.floor_ms for row in rows):
        floor = [(row.floor_ms or 0) / batch for row in rows]
        axes.plot(n, floor, color="#444444", lw=1, ls=(0, (4, 3)), label="at the measured peak", zorder=1)
        axes.fill_between(n, floor, 1e-9, color="#444444", alpha=0.07, lw=0, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(n))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_plots(path: Path) -> list[Path]:
    """Draw the plots of a JSON file of the benchmarks, beside that file; return their paths."""
    record = json.loads(path.read_text())
    rows = [row for row in read_rows(record) if row.name == "inference" and row.case]
    written = []
    for network, dtype in dict.fromkeys((row.case["network"], row.case["dtype"]) for row in rows):
        ours = [row for row in rows if (row.case["network"], row.case["dtype"]) == (network, dtype)]
        figure = time_per_image(ours, record["machine"])
        suffix = "" if dtype == "float32" else f"-{dtype}"
        for ending in ("png", "svg"):
            written.append(path.with_name(f"{path.stem}-{network.lower()}{suffix}.{ending}"))
            # Equal plots give equal files: no date, no random identifiers.
            fixed = {"metadata": {"Date": None}} if ending == "svg" else {}
            with rc_context({"svg.hashsalt": "hne"}), replacing(written[-1]) as temporary:
                figure.savefig(temporary, **fixed)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, metavar="NAME.json")
    for path in save_plots(parser.parse_args().results):
        print(f"written: {path}")


if __name__ == "__main__":
    main()
