"""Equations 9 and 12 written out."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..checks import default_sizes
from .prefix_mean import prefix_mean


def hierarchical_distillation_loss(logits: Tensor, target: Tensor, alpha: float, temperature: float) -> tuple[Tensor]:
    """See :func:`hne_kernels.hierarchical_distillation_loss`; returns a tuple with the loss."""
    none = logits.new_zeros(())
    independent = sum((F.cross_entropy(member, target) for member in logits), none)
    *students, teacher = prefix_mean(logits, default_sizes(logits.shape[0]))
    soft = (teacher.detach() / temperature).softmax(-1)
    distilled = sum((F.cross_entropy(student / temperature, soft) for student in students), none)
    return ((1 - alpha) * independent + alpha * temperature**2 * distilled,)
