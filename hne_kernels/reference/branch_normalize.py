"""Normalisation, sum and activation, each by PyTorch."""

from __future__ import annotations

from torch import Tensor

from .activation import activate


def branch_normalize(x: Tensor, norm: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """See :func:`hne_kernels.branch_normalize`."""
    mean, scale, shift = norm[:, :, None, None, None].unbind()
    y = (x - mean) * scale + shift
    return activate(y if residual is None else y + residual, activation).to(x.dtype)
