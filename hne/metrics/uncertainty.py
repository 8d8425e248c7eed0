"""Uncertainty of an ensemble about each sample; a higher score means less certain.

From the members' logits ``[N, B, L]`` to nats ``[B]``, or from the logits ``[B, L]`` of one prediction to ``[B]``.
"""

from __future__ import annotations

import math

from torch import Tensor

from .precision import at_least_float32


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mixture of the members (the mean of their probabilities): the total uncertainty.

    Args:
        logits: ``[N, B, L]``, of the members.

    Returns:
        ``[B]``, 0 to ``log L``.
    """
    mixture = _log_mixture(at_least_float32(logits).log_softmax(-1))
    return -(mixture.exp() * mixture).sum(-1).clamp_max(0)


def mutual_information(logits: Tensor) -> Tensor:
    """Predictive entropy minus the mean entropy of the members: their disagreement, the epistemic uncertainty.

    It is the information that the label gives about which member is right (BALD; Houlsby et al. 2011). It is computed
    as the mean Kullback-Leibler divergence of a member from the mixture, which is the same without cancellation.

    Args:
        logits: ``[N, B, L]``, of the members.

    Returns:
        ``[B]``, 0 to ``log N``; 0 for a single member.
    """
    members = at_least_float32(logits).log_softmax(-1)
    return (members.exp() * (members - _log_mixture(members))).sum(-1).mean(0).clamp_min(0)


def max_probability(logits: Tensor) -> Tensor:
    """Minus the largest probability (Hendrycks and Gimpel 2017).

    Args:
        logits: ``[B, L]``, of one prediction.

    Returns:
        ``[B]``, -1 to ``-1 / L``.
    """
    return -at_least_float32(logits).softmax(-1).amax(-1)


def max_logit(logits: Tensor) -> Tensor:
    """Minus the largest logit (Hendrycks et al. 2022): ``[B, L]`` to ``[B]``."""
    return -at_least_float32(logits).amax(-1)


def energy(logits: Tensor) -> Tensor:
    """The free energy, minus the log of the sum of the exponentials of the logits (Liu et al. 2020): ``[B, L]`` to
    ``[B]``."""
    return -at_least_float32(logits).logsumexp(-1)


def _log_mixture(members: Tensor) -> Tensor:
    """Log-probabilities of the mixture, ``[N, B, L]`` to ``[B, L]``."""
    return members.logsumexp(0) - math.log(len(members))
