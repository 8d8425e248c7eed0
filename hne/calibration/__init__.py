"""Answers that mean what they say: temperatures, thresholds for early exits, conformal sets.

All functions take the logits of the ensembles of the first 1, 2, ... N members on a validation split that the network
was neither trained nor tested on, as :func:`hne.calibration.nested_logits` makes them.
"""

from __future__ import annotations

from .conformal import conformal_thresholds, prediction_sets
from .early_exit import ExitPoint, choose_confidence, exit_curve, exit_point
from .temperature import fit_temperatures, nested_logits, scaled_logits
