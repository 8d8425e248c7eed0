"""The grouped convolution with one group per channel."""

from __future__ import annotations

from torch import Tensor

from .branch_conv2d import grouped_conv2d


def branch_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int
) -> Tensor:
    """See :func:`hne_kernels.branch_depthwise_conv2d`."""
    filters = weight.unsqueeze(2)  # one input channel each
    groups = weight.shape[0] * weight.shape[1]
    return grouped_conv2d(x, filters, bias, stride, padding, replicate, groups)
