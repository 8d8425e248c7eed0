"""How good an ensemble is at each size, and how different its members are."""

from __future__ import annotations

import torch
from torch import Tensor


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


def diversity(logits: Tensor) -> Tensor:
    """Standard deviation of the logits over the models, averaged over classes and samples: the paper's measure.

    Args:
        logits: ``[N, B, L]``, the leaves.

    Returns:
        Scalar; the deviation is the population's, so a single model has 0.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).std(0, correction=0).mean()
