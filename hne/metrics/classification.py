"""Metrics of classification, for several ensembles at once: one row of logits per ensemble (or member)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .precision import at_least_float32


def correct(logits: Tensor, target: Tensor) -> Tensor:
    """Number of samples that each ensemble classifies correctly.

    Args:
        logits: ``[P, B, L]``, one ensemble (or member) per row.
        target: ``[B]`` class indices.

    Returns:
        ``[P]`` counts, int64.
    """
    return (logits.argmax(-1) == target).sum(-1)


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Fraction of correctly classified samples, ``[P]``; NaN for an empty batch. Arguments as in :func:`correct`."""
    return correct(logits, target) / target.numel()


def negative_log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of the right class in nats, ``[P]``. Arguments as in :func:`correct`."""
    right = target.expand(len(logits), -1)[..., None]
    return -at_least_float32(logits).log_softmax(-1).gather(-1, right)[..., 0].mean(-1)


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of the probabilities from the one-hot label, summed over the classes (Brier 1950).

    Arguments as in :func:`correct`.

    Returns:
        ``[P]``, 0 to 2.
    """
    probabilities = at_least_float32(logits).softmax(-1)
    return (probabilities - F.one_hot(target, logits.shape[-1])).square().sum(-1).mean(-1)
