"""Normalise, convolve, then look at what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .branch_conv2d import branch_conv2d
from .branch_depthwise_conv2d import branch_depthwise_conv2d
from .branch_normalize import branch_normalize


def branch_conv2d_stats(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_conv2d_stats`."""
    return _unit(branch_conv2d, x, weight, *rest)


def branch_depthwise_conv2d_stats(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_depthwise_conv2d_stats`."""
    return _unit(branch_depthwise_conv2d, x, weight, *rest)


def _unit(
    convolution: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    *geometry: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if mean is not None and scale is not None and shift is not None:
        x = branch_normalize(x, mean, scale, shift, None, activation)
    y = convolution(x, weight, None, *geometry)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if y.shape[1:4].numel() == 0:
        zero = wide.sum((1, 2, 3))
        return y, zero, zero.clone()
    var, y_mean = torch.var_mean(wide, (1, 2, 3), correction=0)
    return y, y_mean, var
