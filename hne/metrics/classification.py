"""How good the answers of ensembles are: one row of logits for each ensemble (or leaf)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def correct(logits: Tensor, target: Tensor) -> Tensor:
    """How many samples each ensemble classifies correctly.

    Args:
        logits: ``[P, B, L]``, one ensemble (or leaf) per row.
        target: ``[B]`` class indices.

    Returns:
        ``[P]`` counts, int64.
    """
    return (logits.argmax(-1) == target).sum(-1)


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """The fraction of correct samples for each row of ``logits`` ``[P, B, L]``: ``[P]``, NaN for an empty batch."""
    return correct(logits, target) / target.numel()


def negative_log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of the right class in nats, ``[P]``; arguments as of :func:`correct`."""
    right = target.expand(len(logits), -1)[..., None]
    return -wide(logits).log_softmax(-1).gather(-1, right)[..., 0].mean(-1)


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance of the probabilities from the one-hot label, summed over the classes (Brier 1950): 0 to 2.

    Arguments as of :func:`correct`; ``[P]``.
    """
    probabilities = wide(logits).softmax(-1)
    return (probabilities - F.one_hot(target, logits.shape[-1])).square().sum(-1).mean(-1)


def wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
