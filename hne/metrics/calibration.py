"""Whether an ensemble is right as often as it claims to be."""

from __future__ import annotations

import torch
from torch import Tensor

from .classification import wide

BINS = 15


def calibration_gaps(logits: Tensor, target: Tensor, bins: int = BINS) -> Tensor:
    """Confidence minus correctness, summed over the samples in each bin of confidence.

    Sums, so that those of several batches and processes add up: see :func:`expected_calibration_error`. (A metric that
    keeps every sample, as torchmetrics' does, would have to gather them from all processes.)

    Args:
        logits: ``[P, B, L]``, one ensemble (or leaf) per row.
        target: ``[B]`` class indices.
        bins: Of equal width, each with its upper end: (0, 1/bins], ... (1 - 1/bins, 1].

    Returns:
        ``[P, bins]``.
    """
    confidence, label = wide(logits).softmax(-1).max(-1)
    gap = confidence - (label == target).to(confidence.dtype)
    index = ((confidence * bins).ceil().long() - 1).clamp_(0, bins - 1)
    return torch.zeros(len(logits), bins, dtype=gap.dtype, device=gap.device).scatter_add_(1, index, gap)


def expected_calibration_error(gaps: Tensor, samples: int) -> Tensor:
    """ECE: the mean distance of confidence and accuracy over the bins, weighted by their samples (Guo et al. 2017).

    Args:
        gaps: ``[..., bins]`` of :func:`calibration_gaps`, added up over batches.
        samples: In all of them.

    Returns:
        ``[...]``, 0 to 1.
    """
    return gaps.abs().sum(-1) / samples
