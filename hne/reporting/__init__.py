"""Tables, plots and comparisons of evaluated systems."""

from __future__ import annotations

from ..extras import require

require("train", "rich", "matplotlib")

from .comparison import System, comparison_table, measure_system, write_comparison
from .plots import (
    COST,
    HALO,
    check_plot_path,
    log_cost_axis,
    new_figure,
    plain_text,
    plot_accuracy_against_macs,
    plot_accuracy_against_time,
    plot_reliability,
    plot_widths,
    save_figure,
    style_axes,
)
from .progress import ProgressBar
from .tables import (
    Table,
    format_macs,
    mean_of,
    show_corruptions,
    show_evaluation,
    show_ood,
    show_regression_ood,
    show_table,
    show_uncertainty,
    show_widths,
)
