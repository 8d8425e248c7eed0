"""Metrics of ensembles: accuracy, calibration, differences between the members, uncertainty.

Accuracy, negative log-likelihood, Brier score and calibration judge the softmax of an ensemble's logits, which are the
members' mean logits (eq. 1 and 5 of the paper) or the logarithms of their mean probabilities (:data:`hne.averages`).
Uncertainty is measured on the mixture of the members, the mean of their probabilities, because only
the entropy of a mixture splits into the members' own entropy and their disagreement.
"""

from __future__ import annotations

from ..averages import mixture, prefix_gaussians, prefix_mixtures
from .calibration import BINS, calibration_gaps, expected_calibration_error
from .classification import accuracy, brier_score, correct, negative_log_likelihood
from .detection import Detection, detection
from .diversity import disagreement, diversity
from .gaussian import LEVELS, coverage_counts, coverage_error, gaussian_nll, root_mean_squared_error
from .uncertainty import (
    energy,
    max_logit,
    max_probability,
    mutual_information,
    predictive_entropy,
)
