"""Regression: every member predicts a Gaussian, and the ensemble is the mixture of its members.

A member's Gaussian is its mean and its variance, in two tensors of the same shape.
"""

from __future__ import annotations

import math

from torch import Tensor

from .classification import wide


def mixture(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an equal mixture of Gaussians: the ensemble (Lakshminarayanan et al. 2017).

    The variance is the mean of the members' variances plus the population variance of their means.

    Args:
        mean, variance: ``[N, ...]``, of the members.

    Returns:
        ``[...]`` and ``[...]``, in float32 at least.
    """
    mean, variance = wide(mean), wide(variance)
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


def root_mean_squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """RMSE of the last dimension: ``[..., B]`` and ``[B]`` to ``[...]``."""
    return (wide(mean) - target).square().mean(-1).sqrt()


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets under Gaussians, in nats, constant included.

    Args:
        mean, variance: ``[..., B]``.
        target: ``[B]``.

    Returns:
        ``[...]``.
    """
    mean, variance = wide(mean), wide(variance)
    return (((target - mean).square() / variance + variance.log() + math.log(2 * math.pi)) / 2).mean(-1)
