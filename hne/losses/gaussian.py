"""Objectives of a regression, in which every member predicts a Gaussian.

A model has two outputs per member, ``[N, B, 2]``, which :func:`gaussians` turns into a mean and a variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_MIN_VARIANCE = 1e-4  # of a target normalised to variance 1; a variance of 0 would make the likelihood infinite


def gaussians(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the predicted Gaussians.

    Args:
        outputs: ``[..., 2]``, of a model.

    Returns:
        Mean and variance ``[...]`` of the normalised target, in float32 at least.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return outputs[..., 0], F.softplus(outputs[..., 1]) + _MIN_VARIANCE


def likelihood_objective(normalise: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``L_I`` (eq. 9) for a regression: negative log-likelihood, mean over the batch, sum over the members.

    Args:
        normalise: scales targets ``[B]`` to mean 0 and variance 1 (:meth:`hne.data.TargetFormat.normalise`).

    Returns:
        A function from outputs ``[N, B, 2]`` and targets ``[B]`` to a scalar in nats.
    """

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        mean, variance = gaussians(outputs)
        squares = (normalise(target) - mean).square()
        return ((squares / variance + variance.log() + math.log(2 * math.pi)) / 2).mean(-1).sum()

    return loss


def gaussian_divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Hydra's objective for a regression: KL(member i || head i) of Gaussians, mean over heads and batch.

    Args:
        student: mean and variance ``[N, B]`` of the heads (see :func:`gaussians`).
        teacher: mean and variance ``[N, B]`` of the members.

    Returns:
        Scalar, 0 where the heads equal their members.
    """
    (mean, variance), (teacher_mean, teacher_variance) = student, teacher
    ratio = teacher_variance / variance
    return ((ratio - ratio.log() - 1 + (teacher_mean - mean).square() / variance) / 2).mean()
