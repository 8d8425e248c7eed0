"""The paper's objectives (eq. 9 to 12).

All take the members' logits ``[N, B, L]`` and class indices ``[B]``. Cross-entropies are means over the batch and sums
over the models. The nested ensembles are those of the first 1, 2, 4, ... members, and of all N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import hne_kernels as K

Objective = Callable[[Tensor, Tensor], Tensor]


def independent(logits: Tensor, target: Tensor) -> Tensor:
    """``L_I`` (eq. 9): every member learns the target. Logits ``[N, B, L]``, classes ``[B]``."""
    members = logits.shape[0]
    return members * F.cross_entropy(logits.flatten(0, 1), target.repeat(members))


def hierarchical(logits: Tensor, target: Tensor) -> Tensor:
    """``L_H`` (eq. 10): every nested ensemble learns the target."""
    return independent(K.prefix_mean(logits), target)


def distillation(logits: Tensor, temperature: float) -> Tensor:
    """``L_D`` (eq. 11): every member learns the soft labels of the whole ensemble."""
    return soft_cross_entropy(logits, logits.mean(0), temperature)


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Every model of ``[M, B, L]`` learns the soft labels of a teacher ``[B, L]``; the sum over the models.

    Soft labels and models are softened at ``temperature`` T; the factor T^2 keeps the scale of the gradient
    (Hinton et al. 2015). No gradient flows through the soft labels.
    """
    soft = (teacher.detach() / temperature).softmax(-1)
    log_student = (logits / temperature).log_softmax(-1)
    return temperature**2 * -(soft * log_student).sum(-1).mean(1).sum()


def objective(name: str, alpha: float = 0.5, temperature: float = 2.0) -> Objective:
    """Return an objective by its name.

    ======== ==================================== =========================================================
    ``I``    ``L_I``                              members, each by itself
    ``H``    ``L_H``                              nested ensembles
    ``I+H``  ``(1 - alpha) L_I + alpha L_H``      both
    ``I+D``  ``(1 - alpha) L_I + alpha L_D``      members, distilled from the whole ensemble
    ``I+HD`` ``(1 - alpha) L_I + alpha L_HD``     the paper's: nested ensembles, distilled from the whole (eq. 12)
    ======== ==================================== =========================================================

    The paper states the weights ``1 - alpha`` and ``alpha`` for ``I+HD`` only. The other sums use the same weights, so
    that ``alpha`` is always the share of the second term.

    Args:
        name: one of :data:`OBJECTIVES`.
        alpha: share of the second term, 0 to 1 (the paper: 0.5, and 0.75 on ImageNet); ignored by ``I`` and ``H``.
        temperature: softening of the distillation, above 0 (the paper: 2); used by ``I+D`` and ``I+HD`` only.

    Returns:
        A function from logits ``[N, B, L]`` and class indices ``[B]`` (int64) to a scalar, computed in float32 at
        least.

    Raises:
        ValueError: the name is unknown, or ``alpha`` or ``temperature`` is out of range.
    """
    check_objective(name, alpha, temperature)
    formula = _OBJECTIVES[name]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 3:
            raise ValueError(f"logits must be [models, batch, classes], got shape {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return formula(logits, target, alpha, temperature)

    return loss


def check_objective(name: str, alpha: float, temperature: float = 1.0) -> None:
    """Raise ValueError unless ``name`` is known, and ``alpha`` and ``temperature`` are in their ranges."""
    if name not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    check_settings(alpha, temperature)


def check_settings(alpha: float, temperature: float) -> None:
    """Raise ValueError unless ``alpha`` and ``temperature`` are in their ranges."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")


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
