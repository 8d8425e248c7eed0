"""Convolution, folded batch norm, residual and activation: the kernel of branch_conv2d with an epilogue."""

from __future__ import annotations

from torch import Tensor

from .. import autocast, autograd
from ..ops.fused_conv2d import check
from .branch_conv2d import convolve
from .launch import op


@op
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
    check(x, weight, bias, stride, padding, replicate, activation, residual, residual_replicate)
    return convolve(
        x, weight, bias, stride, padding, replicate,
        packed=True, activation=activation, residual=residual, residual_replicate=residual_replicate,
    )  # fmt: skip


autocast.register("triton_fused_conv2d")
autograd.register_inference("triton_fused_conv2d")
