"""Detection of out-of-distribution samples by an uncertainty score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detection:
    """How well a score separates two sets of samples. *Out of distribution is the positive class.*

    Attributes:
        auroc: area under the ROC curve: probability that an out-of-distribution sample has the higher score (ties
            count half).
        aupr: area under the precision-recall curve (average precision).
        fpr95: false positive rate at the threshold that finds at least 95 % of the out-of-distribution samples.
    """

    auroc: float
    aupr: float
    fpr95: float


def detection(inside: Tensor, outside: Tensor) -> Detection:
    """Compare the scores of in-distribution samples with those of out-of-distribution samples.

    Args:
        inside: scores of in-distribution samples, floating point ``[I]``.
        outside: scores of out-of-distribution samples, floating point ``[O]``; these should be higher.

    Raises:
        ValueError: one of them is empty, or a score is not finite.
    """
    # Importing torchmetrics takes a second.
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
    # Only the order of the scores counts. torchmetrics takes values outside [0, 1] for logits and rounds them, so it
    # gets ranks in [0, 1].
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
