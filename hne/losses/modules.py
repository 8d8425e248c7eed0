"""The objectives as modules, for a training loop of your own: a loss of stacked logits and targets."""

from __future__ import annotations

from torch import Tensor, nn

from .hydra import average_teacher, hydra_loss
from .objectives import check_settings, objective


class IndependentLoss(nn.Module):
    """``L_I`` (eq. 9): the sum over the members of the cross-entropy with the target.

    Shape:
        - logits: ``[N, B, L]`` of the N members, floating point.
        - target: class indices ``[B]``, int64.
        - output: scalar, in float32 at least.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return objective("I")(logits, target)


class HierarchicalLoss(nn.Module):
    """``L_H`` (eq. 10): the sum over the ensembles of 1, 2, 4, ... N members. Shapes as :class:`IndependentLoss`."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return objective("H")(logits, target)


class HierarchicalDistillationLoss(nn.Module):
    """The paper's objective ``(1 - alpha) L_I + alpha L_HD`` (eq. 9 and 12), by one op for value and gradient.

    The members learn the target. The ensembles of the first 1, 2, 4, ... members learn the soft labels of all N, both
    at ``temperature`` T, times T^2; the soft labels get no gradient. Any N networks that train together will do.

    Args:
        alpha: share of the distillation, 0 to 1 (the paper: 0.5, and 0.75 on ImageNet).
        temperature: T, above 0 (the paper: 2).

    Shape:
        - logits: ``[N, B, L]`` of the N members, floating point. The last ones may be missing: any n of 1 to N.
        - target: class indices ``[B]``, int64.
        - output: scalar, in float32 at least.

    Raises:
        ValueError: ``alpha`` or ``temperature`` is out of range; in a call, a shape or class index does not fit.
        TypeError: in a call, a dtype does not fit.
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__()
        check_settings(alpha, temperature)
        self.alpha, self.temperature = alpha, temperature

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return objective("I+HD", self.alpha, self.temperature)(logits, target)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, temperature={self.temperature:g}"


class HydraLoss(nn.Module):
    """Hydra's objective (Tran et al. 2020): KL(member i || head i) at ``temperature`` T, mean over heads, times T^2.

    Args:
        temperature: T, above 0.

    Shape:
        - logits: ``[N, B, L]`` of the student's heads.
        - teacher: logits ``[N, B, L]`` of the members; for one head of any number of members, whose average it learns.
          No gradient flows into them.
        - output: scalar, in float32 at least.

    Raises:
        ValueError: ``temperature`` is out of range; in a call, the shapes do not fit.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        check_settings(0, temperature)
        self.temperature = temperature

    def forward(self, logits: Tensor, teacher: Tensor) -> Tensor:
        teacher = teacher.detach()
        if logits.dim() == teacher.dim() == 3 and len(logits) == 1 < len(teacher):
            teacher = average_teacher(teacher, self.temperature)
        return hydra_loss(logits, teacher, self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"
