"""Metrics of regression: every member predicts a Gaussian, and the ensemble is the mixture of its members.

A Gaussian is given by its mean and its variance, in two tensors of the same shape.
"""

from __future__ import annotations

import math

from torch import Tensor

from .precision import at_least_float32


def mixture(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an equal mixture of Gaussians (Lakshminarayanan et al. 2017).

    The variance is the mean of the members' variances plus the population variance of their means.

    Args:
        mean, variance: ``[N, ...]``, of the members.

    Returns:
        ``[...]`` and ``[...]``, in float32 at least.
    """
    mean, variance = at_least_float32(mean), at_least_float32(variance)
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


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
