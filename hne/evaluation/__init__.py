"""Evaluation of trained models: quality on test data, detection of out-of-distribution images, latency."""

from __future__ import annotations

from .classification import EnsembleMetrics, EnsembleTotals, Evaluation, evaluate, evaluate_members
from .corruptions import CorruptionEvaluation, evaluate_corruptions, mean_metrics
from .exits import evaluate_exits
from .latency import AnytimeStep, alternating_seconds, measure_anytime, seconds_per_call
from .ood import OODEvaluation, evaluate_ood
from .predict import Ensemble, predict
from .regression import RegressionEvaluation, RegressionMetrics, evaluate_regression
from .regression_ood import RegressionOODEvaluation, evaluate_regression_ood
from .speed import COMPILED, EAGER, FUSED, SIDES, InferenceSides, TrainingSides
from .widths import AtWidth, by_width, evaluate_widths, pareto_front
