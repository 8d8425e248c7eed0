"""Conformal prediction: sets of classes that hold the right one with a given probability (Vovk et al. 2005).

Split conformal prediction with the score ``1 - p(right class)`` (Sadinle et al. 2019): on samples that are exchangeable
with those of the validation split, a set misses the right class with probability ``1 - coverage`` at most, whatever the
network. That holds on average over samples, not for each class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_logits, check_share, check_target


def conformal_thresholds(logits: Tensor, target: Tensor, coverage: float) -> tuple[float, ...]:
    """The least probability of a class in the set of each ensemble.

    It is the ``ceil((B + 1) coverage)``-th largest probability that the right class has among the B samples; 0 if that
    number is above B: there are too few samples for such a coverage, and a set has every class.

    Args:
        logits: ``[P, B, L]``, one ensemble per row, scaled by its temperature if there is one.
        target: Classes ``[B]``, int64.
        coverage: Probability that a set holds the right class, above 0 and below 1.

    Returns:
        P thresholds.

    Raises:
        ValueError: The shapes do not fit, or a value is out of range.
    """
    check_logits("logits", logits)
    check_target(target, logits)
    check_share("coverage", coverage)
    right = logits.double().softmax(-1).gather(2, target.expand(len(logits), -1)[..., None])[..., 0]
    samples = right.shape[1]
    rank = math.ceil(round((samples + 1) * coverage, 9))  # 10 * 0.9 is 9.000000000000002
    if rank > samples:
        return (0.0,) * len(logits)
    return tuple(right.sort(dim=1, descending=True).values[:, rank - 1].tolist())


def prediction_sets(logits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The classes in the set of each sample: ``[P, B, L]`` to bool ``[P, B, L]``.

    A set may be empty where no class is likely enough.

    Args:
        logits: Of the same ensembles as in :func:`conformal_thresholds`, scaled alike.
        thresholds: From there.

    Raises:
        ValueError: There is another number of thresholds.
    """
    if len(thresholds) != len(logits):
        raise ValueError(f"thresholds: expected {len(logits)}, one for each ensemble, got {len(thresholds)}")
    least = torch.tensor(thresholds, dtype=torch.float64, device=logits.device)[:, None, None]
    return logits.double().softmax(-1) >= least
