"""Detection of out-of-distribution samples by an uncertainty score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..extras import require


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
        ModuleNotFoundError: scikit-learn is not installed.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or not len(scores):
            raise ValueError(f"{name} must be scores [samples] of at least one sample, got shape {tuple(scores.shape)}")
        if not scores.isfinite().all():
            raise ValueError(f"{name} must be finite scores, got NaN or infinity among them")
    require("train", "sklearn")
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # importing it takes a second

    # Only the order of the scores counts: ranks keep values apart that differ in the last bit of any precision.
    ranks = torch.cat([inside, outside]).unique(return_inverse=True)[1].cpu().numpy()
    label = [0] * len(inside) + [1] * len(outside)
    false_positives, true_positives, _ = roc_curve(label, ranks, drop_intermediate=False)
    return Detection(
        float(roc_auc_score(label, ranks)),
        float(average_precision_score(label, ranks)),
        float(false_positives[true_positives >= 0.95][0]),
    )
