"""Batch norm of all branches' channels side by side, sum, activation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import activate


def branch_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_batch_norm`."""
    branches, count = x.shape[0], x.shape[1:4].numel()
    interleaved = x.permute(1, 0, 4, 2, 3).flatten(1, 2)
    mean, var = torch.zeros_like(weight).flatten(), torch.zeros_like(weight).flatten()
    # With momentum 1 the running statistics are those of this batch (the variance unbiased).
    y = F.batch_norm(interleaved, mean, var, weight.flatten(), bias.flatten(), True, 1.0, eps)
    y = y.unflatten(1, (branches, -1)).permute(1, 0, 3, 4, 2)
    y = activate(y if residual is None else y + residual, activation)
    return y, mean.view_as(weight), (var * (max(count - 1, 0) / max(count, 1))).view_as(weight)
