"""Telling samples of another distribution by the uncertainty about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detection:
    """How well a score tells two sets apart. *Out of distribution is the positive class.*

    Attributes:
        auroc: area under the ROC curve: how often a sample from outside has the higher score (ties count half).
        aupr: area under the curve of precision against recall (average precision).
        fpr95: share of the samples from inside that are taken for ones from outside, at the threshold that finds at
            least 95 % of these.
    """

    auroc: float
    aupr: float
    fpr95: float


def detection(inside: Tensor, outside: Tensor) -> Detection:
    """Compare the scores of samples from inside the distribution with those of samples from outside.

    Args:
        inside, outside: ``[I]`` and ``[O]``, floating point; a high score says "from outside".

    Raises:
        ValueError: one of them is empty, or a score is not finite.
    """
    # A second to import: only for who wants it.
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_average_precision,
        binary_specificity_at_sensitivity,
    )

    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or not len(scores):
            raise ValueError(f"{name} must be scores [samples] of at least one sample, got shape {tuple(scores.shape)}")
        if not scores.isfinite().all():
            raise ValueError(f"{name} must be finite scores, got NaN or infinity among them")
    # Only their order counts; what lies outside of [0, 1], torchmetrics would take for logits and round.
    ranks = torch.cat([inside, outside]).unique(return_inverse=True)[1].double()
    ranks /= max(1, len(ranks))
    label = torch.zeros(len(ranks), dtype=torch.long, device=ranks.device)
    label[len(inside) :] = 1
    specificity, _ = binary_specificity_at_sensitivity(ranks, label, min_sensitivity=0.95)
    return Detection(
        binary_auroc(ranks, label).item(),
        binary_average_precision(ranks, label).item(),
        1 - specificity.item(),
    )
