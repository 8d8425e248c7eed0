"""How good an ensemble is, how different its members are, and what it knows of its ignorance.

An ensemble's *answer* is the softmax of its members' mean logits (eq. 1 and 5 of the paper): accuracy, NLL, Brier score
and calibration are those of the answer. Its *uncertainty* is measured on the mixture of its members, the mean of their
probabilities: only of a mixture the entropy splits into the members' own and what they disagree about.
"""

from __future__ import annotations

from ..integrations.torch_uncertainty import TorchUncertainty, stacked_members
from .calibration import BINS, calibration_gaps, expected_calibration_error
from .classification import accuracy, brier_score, correct, negative_log_likelihood
from .detection import Detection, detection
from .diversity import disagreement, diversity
from .gaussian import gaussian_nll, mixture, root_mean_squared_error
from .uncertainty import mutual_information, predictive_entropy

__all__ = [
    "BINS",
    "Detection",
    "TorchUncertainty",
    "accuracy",
    "brier_score",
    "calibration_gaps",
    "correct",
    "detection",
    "disagreement",
    "diversity",
    "expected_calibration_error",
    "gaussian_nll",
    "mixture",
    "mutual_information",
    "negative_log_likelihood",
    "predictive_entropy",
    "root_mean_squared_error",
    "stacked_members",
]
