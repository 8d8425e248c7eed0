"""Metrics of regression, in which a network or an ensemble predicts a Gaussian.

A Gaussian is given by its mean and its variance, in two tensors of the same shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import at_least_float32

LEVELS = tuple(percent / 100 for percent in range(5, 100, 5))
"""Probabilities of the central intervals whose coverage is measured: 0.05, 0.1, ... 0.95."""


def root_mean_squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """RMSE over the last dimension.

    Args:
        mean: ``[..., B]``, predictions.
        target: ``[B]``.

    Returns:
        ``[...]``.
    """
    return (at_least_float32(mean) - target).square().mean(-1).sqrt()


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets under Gaussians, in nats, constant included.

    Args:
        mean, variance: ``[..., B]``.
        target: ``[B]``.

    Returns:
        ``[...]``.
    """
    mean, variance = at_least_float32(mean), at_least_float32(variance)
    return (((target - mean).square() / variance + variance.log() + math.log(2 * math.pi)) / 2).mean(-1)


def coverage_counts(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Number of targets inside the central interval that a Gaussian gives each probability of :data:`LEVELS`.

    Counts add up over batches and processes (see :func:`coverage_error`).

    Args:
        mean, variance: ``[..., B]``.
        target: ``[B]``.

    Returns:
        ``[..., len(LEVELS)]``, int64.
    """
    mean, variance = at_least_float32(mean), at_least_float32(variance)
    levels = torch.tensor(LEVELS, dtype=mean.dtype, device=mean.device)
    half_widths = torch.special.ndtri((1 + levels) / 2)  # in standard deviations
    distance = (target - mean).abs() / variance.sqrt()
    return (distance[..., None] <= half_widths).sum(-2)


def coverage_error(counts: Tensor, samples: int) -> Tensor:
    """Mean distance between the share of targets inside an interval and its probability (Kuleshov et al. 2018).

    Args:
        counts: ``[..., len(LEVELS)]`` from :func:`coverage_counts`, summed over batches.
        samples: number of targets in all batches.

    Returns:
        ``[...]``, 0 to 0.5; 0 for perfectly calibrated intervals.
    """
    shares = at_least_float32(counts) / samples
    return (shares - torch.tensor(LEVELS, dtype=shares.dtype, device=shares.device)).abs().mean(-1)
