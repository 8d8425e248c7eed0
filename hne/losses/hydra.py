"""Hydra's objective (Tran et al. 2020): the heads of one network learn from the members of an ensemble."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def hydra_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(member i || head i), mean over heads and batch, times T^2; both are softened at ``temperature`` T.

    Args:
        logits: ``[N, B, L]``, of the heads.
        teacher: logits ``[N, B, L]`` of the members; for a single head, their average (:func:`average_teacher`).
        temperature: above 0.

    Returns:
        Scalar in float32 at least, 0 where the heads equal their members.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"teacher must have the shape of logits, {tuple(logits.shape)}, got {tuple(teacher.shape)}")
    heads, members = (_log_probabilities(y, temperature) for y in (logits, teacher))
    return temperature**2 * F.kl_div(heads, members, reduction="none", log_target=True).sum(-1).mean()


def average_teacher(teacher: Tensor, temperature: float) -> Tensor:
    """Combine the members of an ensemble into one teacher, for a single network (Hinton et al. 2015).

    Args:
        teacher: logits ``[N, B, L]`` of the members.
        temperature: above 0.

    Returns:
        Logits ``[1, B, L]`` whose softened probabilities are the mean of the members' softened probabilities.
    """
    return temperature * (_log_probabilities(teacher, temperature).logsumexp(0, keepdim=True) - math.log(len(teacher)))


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softened log-probabilities, in float32 at least."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
