"""Objectives of a regression, in which every member predicts a Gaussian.

A model has two outputs per member, ``[N, B, 2]``, which :func:`gaussians` turns into a mean and a variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hne_kernels import default_sizes

from ..averages import mixture, prefix_gaussians
from .objectives import Objective, check_objective

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


def gaussian_objective(normalise: Callable[[Tensor], Tensor], name: str = "I", alpha: float = 0.5) -> Objective:
    """Return an objective (:func:`objective`) of a regression.

    The negative log-likelihood takes the place of the cross-entropy with a label, and the cross-entropy of Gaussians
    that of the one with soft labels. Members are ``p_n``; the ensemble ``p^b`` of the first b members is the Gaussian
    with the mean and the variance of their mixture, and ``p^E`` that of all N::

        L_I  = sum_n      -log p_n(target)              eq. 9
        L_H  = sum_{b<=B} -log p^b(target)              eq. 10
        L_D  = sum_n      E[-log p_n(y)], y from p^E    eq. 11
        L_HD = sum_{b<B}  E[-log p^b(y)], y from p^E    eq. 12

    They are means over the batch, and no gradient flows through ``p^E``. There is no temperature: a class that is
    improbable needs softening to teach anything, a Gaussian has no such classes.

    Args:
        normalise: scales targets ``[B]`` to mean 0 and variance 1 (:meth:`hne.data.TargetFormat.normalise`).
        name: one of :data:`OBJECTIVES`.
        alpha: share of the second term, 0 to 1; ignored by ``I`` and ``H``.

    Returns:
        A function from outputs ``[N, B, 2]`` and targets ``[B]`` to a scalar in nats, in float32 at least.

    Raises:
        ValueError: the name is unknown, or ``alpha`` is out of range.
    """
    check_objective(name, alpha)
    first, _, second = name.partition("+")

    def term(kind: str, mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
        if kind == "I":
            return _cross_entropy(mean, variance, target)
        teacher, uncertainty = (moment.detach() for moment in mixture(mean, variance))
        if kind == "D":
            return _cross_entropy(mean, variance, teacher, uncertainty)
        mean, variance = prefix_gaussians(mean, variance, default_sizes(len(mean)))
        if kind == "H":
            return _cross_entropy(mean, variance, target)
        return _cross_entropy(mean[:-1], variance[:-1], teacher, uncertainty)  # HD

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        if outputs.dim() != 3 or outputs.shape[-1] != 2:
            raise ValueError(f"outputs must be [members, batch, 2], got shape {tuple(outputs.shape)}")
        (mean, variance), target = gaussians(outputs), normalise(target)
        if not second:
            return term(first, mean, variance, target)
        return (1 - alpha) * term(first, mean, variance, target) + alpha * term(second, mean, variance, target)

    return loss


def _cross_entropy(mean: Tensor, variance: Tensor, target: Tensor, uncertainty: Tensor | float = 0.0) -> Tensor:
    """``E[-log p(y)]`` for y with mean ``target`` and variance ``uncertainty``: mean over the batch, sum over models.

    A log-density is quadratic in y, so nothing else of y's distribution counts. Without uncertainty it is the
    negative log-likelihood.
    """
    squares = (target - mean).square() + uncertainty
    return ((squares / variance + variance.log() + math.log(2 * math.pi)) / 2).mean(-1).sum()


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
