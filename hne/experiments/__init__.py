"""The experiments of the HNE paper by name: their designs, training runs, results and reports."""

from .designs import STUDIES, Curve, Panel, Study, StudySettings, study_panels, training_configs
from .report import panel_tables, write_report
from .results import CurveResult, Estimate, PanelResult, Result, collect_results
from .runs import RunState, lock_runs, macs_per_epoch, read_run_state, run_name
