"""Activations by name."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def activate(x: Tensor, activation: str) -> Tensor:
    """``none``, ``relu`` or ``relu6`` of a tensor."""
    return x if activation == "none" else getattr(F, activation)(x)
