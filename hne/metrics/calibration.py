"""Calibration: whether an ensemble is right as often as its confidence says."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32

BINS = 15


def calibration_gaps(logits: Tensor, target: Tensor, bins: int = BINS) -> Tensor:
    """Confidence minus correctness, summed over the samples in each bin of confidence.

    Sums add up over batches and processes (see :func:`expected_calibration_error`): no sample has to be
    kept or gathered.

    Args:
        logits: ``[P, B, L]``, one ensemble (or member) per row.
        target: ``[B]`` class indices.
        bins: number of bins of equal width, each including its upper end: (0, 1/bins], ... (1 - 1/bins, 1].

    Returns:
        ``[P, bins]``.
    """
    confidence, label = at_least_float32(logits).softmax(-1).max(-1)
    gap = confidence - (label == target).to(confidence.dtype)
    index = ((confidence * bins).ceil().long() - 1).clamp_(0, bins - 1)
    return torch.zeros(len(logits), bins, dtype=gap.dtype, device=gap.device).scatter_add_(1, index, gap)


def expected_calibration_error(gaps: Tensor, samples: int) -> Tensor:
    """ECE: mean distance between confidence and accuracy over the bins, weighted by samples (Guo et al. 2017).

    Args:
        gaps: ``[..., bins]`` from :func:`calibration_gaps`, summed over batches.
        samples: number of samples in all batches.

    Returns:
        ``[...]``, 0 to 1.
    """
    return gaps.abs().sum(-1) / samples
