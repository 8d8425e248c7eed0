"""The objectives of the paper (eq. 9 to 12): what an ensemble is trained for.

All take the logits of the leaves ``[N, B, L]`` and class indices ``[B]``. Cross-entropies are means over the batch and
sums over the models; the nested ensembles are those of 1, 2, 4, ... leaves and of all N.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import hne_kernels as K

Objective = Callable[[Tensor, Tensor], Tensor]


def independent(logits: Tensor, target: Tensor) -> Tensor:
    """``L_I`` (eq. 9): every leaf learns the target. Logits ``[N, B, L]``, classes ``[B]``."""
    models = logits.shape[0]
    return models * F.cross_entropy(logits.flatten(0, 1), target.repeat(models))


def hierarchical(logits: Tensor, target: Tensor) -> Tensor:
    """``L_H`` (eq. 10): every ensemble, from one leaf to all, learns the target."""
    return independent(K.prefix_mean(logits), target)


def distillation(logits: Tensor, temperature: float) -> Tensor:
    """``L_D`` (eq. 11): every leaf learns the soft labels of the whole ensemble.

    Soft labels and students are at ``temperature`` T, and the loss is times T^2, which keeps the scale of its gradient
    (Hinton et al. 2015). No gradient goes through the whole ensemble.
    """
    soft = (logits.mean(0).detach() / temperature).softmax(-1)
    log_student = (logits / temperature).log_softmax(-1)
    return temperature**2 * -(soft * log_student).sum(-1).mean(1).sum()


def hydra(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hydra's objective (Tran et al. 2020): head i learns from member i of another ensemble.

    The mean over heads and batch of KL(member i || head i), both softened at ``temperature`` T, times T^2.

    Args:
        logits: Of the heads, ``[N, B, L]``.
        teacher: Of the members, ``[N, B, L]``; or of their average (:func:`averaged`), for one head.
        temperature: Above 0.

    Returns:
        Scalar in float32 at least, 0 where the heads are their members.

    Raises:
        ValueError: The shapes differ.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"teacher must have the shape of logits, {tuple(logits.shape)}, got {tuple(teacher.shape)}")
    heads, members = (_soft(y, temperature) for y in (logits, teacher))
    return temperature**2 * F.kl_div(heads, members, reduction="none", log_target=True).sum(-1).mean()


def averaged(teacher: Tensor, temperature: float) -> Tensor:
    """Logits ``[1, B, L]`` whose softened probabilities are the mean of those of the members ``[N, B, L]``.

    What one network learns from an ensemble (Hinton et al. 2015).
    """
    return temperature * (_soft(teacher, temperature).logsumexp(0, keepdim=True) - math.log(len(teacher)))


def _soft(logits: Tensor, temperature: float) -> Tensor:
    """Softened log-probabilities, in float32 at least."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def objective(name: str, alpha: float = 0.5, temperature: float = 2.0) -> Objective:
    """What to minimise, by name.

    ======== ==================================== =========================================================
    ``I``    ``L_I``                              leaves, each by itself
    ``H``    ``L_H``                              nested ensembles
    ``I+H``  ``(1 - alpha) L_I + alpha L_H``      both
    ``I+D``  ``(1 - alpha) L_I + alpha L_D``      leaves, distilled from the whole ensemble
    ``I+HD`` ``(1 - alpha) L_I + alpha L_HD``     the paper's: nested ensembles, distilled from the whole (eq. 12)
    ======== ==================================== =========================================================

    The paper gives the weights ``1 - alpha`` and ``alpha`` for ``I+HD``. The other sums are weighted alike, so that
    ``alpha`` is always the share of the second term.

    Args:
        name: One of :data:`OBJECTIVES`.
        alpha: Share of the second term, 0 to 1 (the paper: 0.5, and 0.75 on ImageNet). ``I`` and ``H`` have none.
        temperature: Softening of the distillation, above 0 (the paper: 2). Only ``I+D`` and ``I+HD`` have one.

    Returns:
        A function from logits ``[N, B, L]`` and class indices ``[B]`` (int64) to a scalar, computed in float32 at
        least.

    Raises:
        ValueError: An unknown name, or ``alpha`` or ``temperature`` out of range.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    formula = _OBJECTIVES[name]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 3:
            raise ValueError(f"logits must be [models, batch, classes], got shape {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return formula(logits, target, alpha, temperature)

    return loss


_OBJECTIVES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "I": lambda y, t, alpha, temperature: independent(y, t),
    "H": lambda y, t, alpha, temperature: hierarchical(y, t),
    "I+H": lambda y, t, alpha, temperature: (1 - alpha) * independent(y, t) + alpha * hierarchical(y, t),
    "I+D": lambda y, t, alpha, temperature: (1 - alpha) * independent(y, t) + alpha * distillation(y, temperature),
    "I+HD": lambda y, t, alpha, temperature: K.hierarchical_distillation_loss(
        y, t, alpha=alpha, temperature=temperature
    ),
}
OBJECTIVES = tuple(_OBJECTIVES)
