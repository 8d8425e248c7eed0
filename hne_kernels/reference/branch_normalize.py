"""Normalisation, sum and activation, each by PyTorch."""

from __future__ import annotations

from torch import Tensor

from .activation import activate


def branch_normalize(
    x: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, activation: str
) -> Tensor:
    """See :func:`hne_kernels.branch_normalize`."""
    y = _normalize(x, norm)
    if residual is not None:
        y = y + (residual if residual_norm is None else _normalize(residual, residual_norm))
    return activate(y, activation).to(x.dtype)


def _normalize(x: Tensor, norm: Tensor) -> Tensor:
    mean, scale, shift = norm[:, :, None, None, None].unbind()
    return (x - mean) * scale + shift
