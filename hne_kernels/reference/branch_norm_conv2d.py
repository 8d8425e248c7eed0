"""Normalise, convolve, and take the statistics of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from .branch_conv2d import branch_conv2d
from .branch_depthwise_conv2d import branch_depthwise_conv2d
from .branch_normalize import branch_normalize


def branch_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    activation: str,
    stride: int,
    padding: int,
    replicate: int,
    materialize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_norm_conv2d`; the last result is empty unless ``materialize``."""
    z = x if norm is None else branch_normalize(x, norm, residual, residual_norm, activation)
    convolve = branch_depthwise_conv2d if weight.dim() == 4 else branch_conv2d
    y = convolve(z, weight, None, stride, padding, replicate)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if y.shape[1:4].numel() == 0:
        mean = wide.sum((1, 2, 3))
        var = mean.clone()
    else:
        var, mean = torch.var_mean(wide, (1, 2, 3), correction=0)
    return y, mean, var, z if materialize else x.new_empty(0)
