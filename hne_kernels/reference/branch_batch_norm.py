"""Batch norm of all branches' channels side by side, sum, activation."""

from __future__ import annotations

from torch import Tensor

from .activation import activate


def branch_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_batch_norm`."""
    wide = x.to(weight.dtype)
    var, mean = (s[:, None, None, None] for s in _var_mean(wide))
    scale, shift = (p[:, None, None, None] for p in (weight, bias))
    y = (wide - mean) * (var + eps).rsqrt() * scale + shift
    if residual is not None:
        y = y + residual
    y = activate(y, activation).to(x.dtype)
    return y, mean.detach()[:, 0, 0, 0], var.detach()[:, 0, 0, 0]


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = x.flatten(1, 3).var(1, correction=0), x.flatten(1, 3).mean(1)
    return var, mean
