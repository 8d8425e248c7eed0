"""Convolution, residual, then activation."""

from __future__ import annotations

from torch import Tensor

from ..packing import unpack_weight
from .activation import activate
from .branch_conv2d import branch_conv2d, replicated


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    replicate: int,
    activation: str,
    residual: Tensor | None = None,
    residual_replicate: int = 1,
) -> Tensor:
    """See :func:`hne_kernels.fused_conv2d`."""
    y = branch_conv2d(x, unpack_weight(weight, bias.shape[1]), bias, stride, padding, replicate)
    if residual is not None:
        y = y + replicated(residual, residual_replicate, y.shape[0])
    return activate(y, activation)
