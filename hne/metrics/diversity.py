"""Differences between the members of an ensemble, from their logits ``[N, B, L]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .precision import at_least_float32


def diversity(logits: Tensor) -> Tensor:
    """Standard deviation of the logits over the members, averaged over classes and samples: the paper's measure.

    Args:
        logits: ``[N, B, L]``, of the members.

    Returns:
        Scalar. It is the population's standard deviation, so a single member has 0.
    """
    return at_least_float32(logits).std(0, correction=0).mean()


def disagreement(logits: Tensor) -> Tensor:
    """Share of the pairs of members that predict different classes, averaged over the samples.

    Args:
        logits: ``[N, B, L]``, of the members.

    Returns:
        Scalar, 0 to 1; 0 for a single member, which has no pairs.
    """
    members = logits.shape[0]
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)  # [B, L]
    agreeing = (votes * (votes - 1)).sum(-1) / max(1, members * (members - 1))
    return (1 - agreeing).mean() if members > 1 else agreeing.mean()
