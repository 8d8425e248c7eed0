"""The objectives at smaller widths of a slimmable ensemble: in-place distillation (Yu & Huang, ICCV 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hne_kernels as K

from .objectives import check_objective, soft_cross_entropy

NarrowObjective = Callable[[Tensor, Tensor], Tensor]


def narrow_objective(name: str, alpha: float = 0.5, temperature: float = 2.0) -> NarrowObjective:
    """Return the objective of a smaller width, for the objective ``name`` of full width (:func:`objective`).

    US-Nets train the largest width on the labels, and every other one on its soft predictions. In the ensemble the
    teacher of full width is that of hierarchical distillation, the mean ``y^E`` of all its members (eq. 11 and 12).
    With ``q_T = softmax(y^E / T)`` at full width, without gradient, and members ``y_n`` and nested ensembles ``y^b`` of
    the smaller width, each term of the objective becomes::

        L_I  = sum_n      CE(y_n, q_1)               eq. 9:  soft predictions in place of the labels, as in US-Nets
        L_H  = sum_{b<=B} CE(y^b, q_1)               eq. 10
        L_D  = sum_n      T^2 CE(y_n / T, q_T)       eq. 11: the teacher is that of full width, not the narrow one
        L_HD = sum_{b<B}  T^2 CE(y^b / T, q_T)       eq. 12

    and the sum has the weights of full width. One teacher for all widths keeps a small network, whose own ensemble is
    less accurate, from teaching its members; and the same sums as at full width make a single network (N = 1), where
    eq. 12 has no terms, a US-Net: ``CE(y, labels)`` at full width and ``CE(y_w, q_1)`` at the others, both times the
    weight ``1 - alpha``.

    Args:
        name, alpha, temperature: As for :func:`objective`.

    Returns:
        A function from logits ``[N, B, L]`` of the smaller width and logits ``[N, B, L]`` of full width to a scalar,
        computed in float32 at least. No gradient flows into the latter.

    Raises:
        ValueError: The name is unknown, or ``alpha`` or ``temperature`` is out of range.
    """
    check_objective(name, alpha, temperature)
    first, _, second = name.partition("+")

    def term(kind: str, logits: Tensor, teacher: Tensor) -> Tensor:
        if kind == "I":
            return soft_cross_entropy(logits, teacher)
        if kind == "H":
            return soft_cross_entropy(K.prefix_mean(logits), teacher)
        if kind == "D":
            return soft_cross_entropy(logits, teacher, temperature)
        return soft_cross_entropy(K.prefix_mean(logits)[:-1], teacher, temperature)  # HD

    def loss(logits: Tensor, full: Tensor) -> Tensor:
        if logits.dim() != 3 or logits.shape != full.shape:
            raise ValueError(
                f"logits and those of full width must be [models, batch, classes], got shapes {tuple(logits.shape)} "
                f"and {tuple(full.shape)}"
            )
        logits, full = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (logits, full))
        teacher = full.detach().mean(0)
        if not second:
            return term(first, logits, teacher)
        return (1 - alpha) * term(first, logits, teacher) + alpha * term(second, logits, teacher)

    return loss
