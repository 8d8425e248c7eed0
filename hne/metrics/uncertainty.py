"""How uncertain an ensemble is, sample by sample: logits of its leaves ``[N, B, L]`` to figures in nats ``[B]``."""

from __future__ import annotations

import math

from torch import Tensor

from .classification import wide


def predictive_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mixture of the models, the mean of their probabilities: the total uncertainty.

    Args:
        logits: ``[N, B, L]``, the leaves.

    Returns:
        ``[B]``, 0 to ``log L``.
    """
    mixture = _log_mixture(wide(logits).log_softmax(-1))
    return -(mixture.exp() * mixture).sum(-1).clamp_max(0)


def mutual_information(logits: Tensor) -> Tensor:
    """What the models disagree about: the predictive entropy less the mean entropy of the models.

    It is the information that the answer would give about which model is right (BALD; Houlsby et al. 2011), the
    epistemic part of the uncertainty. Computed as the mean divergence of a model from the mixture, which is the same
    and does not cancel.

    Args:
        logits: ``[N, B, L]``, the leaves.

    Returns:
        ``[B]``, 0 to ``log N``; 0 for a single model.
    """
    models = wide(logits).log_softmax(-1)
    return (models.exp() * (models - _log_mixture(models))).sum(-1).mean(0).clamp_min(0)


def _log_mixture(models: Tensor) -> Tensor:
    """Log-probabilities of the mixture, ``[N, B, L]`` to ``[B, L]``."""
    return models.logsumexp(0) - math.log(len(models))
