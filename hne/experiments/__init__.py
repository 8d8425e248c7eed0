"""The experiments of the HNE paper by name, and the comparison of ensembles from one trained network."""

from .comparison import (
    comparison_panel,
    comparison_tables,
    measure_quality,
    measure_times,
    training_table,
    write_comparison_report,
)
from .designs import STUDIES, Curve, Panel, Study, StudySettings, study_panels, training_configs
from .mc_dropout import MCDropout, with_dropout
from .report import panel_tables, write_report
from .results import CurveResult, Estimate, PanelResult, Result, collect_results
from .rivals import RivalConfig, study_trainer
from .runs import RunState, lock_runs, macs_per_epoch, read_run_state, run_name
from .systems import System, SystemConfig, compared_systems, make_trainer
from .times import load_run, with_times
