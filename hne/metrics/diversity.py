"""How different the members of an ensemble are: logits of its leaves ``[N, B, L]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .classification import wide


def diversity(logits: Tensor) -> Tensor:
    """Standard deviation of the logits over the models, averaged over classes and samples: the paper's measure.

    Args:
        logits: ``[N, B, L]``, the leaves.

    Returns:
        Scalar; the deviation is the population's, so a single model has 0.
    """
    return wide(logits).std(0, correction=0).mean()


def disagreement(logits: Tensor) -> Tensor:
    """The share of the pairs of models that name different classes, averaged over the samples.

    Args:
        logits: ``[N, B, L]``, the leaves.

    Returns:
        Scalar, 0 to 1; 0 for a single model, which has no one to disagree with.
    """
    models = logits.shape[0]
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)  # [B, L]
    agreeing = (votes * (votes - 1)).sum(-1) / max(1, models * (models - 1))
    return (1 - agreeing).mean() if models > 1 else agreeing.mean()
