"""Convolution, then activation."""

from __future__ import annotations

from torch import Tensor

from ..packing import unpack_weight
from .activation import activate
from .branch_conv2d import branch_conv2d


def fused_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, replicate: int, activation: str
) -> Tensor:
    """See :func:`hne_kernels.fused_conv2d`."""
    filters = unpack_weight(weight, bias.shape[1])
    return activate(branch_conv2d(x, filters, bias, stride, padding, replicate), activation)
