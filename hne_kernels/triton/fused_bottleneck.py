"""A bottleneck as three or four kernels, as a Triton program cannot hold the expanded feature map in shared memory.

Activations, sum and shortcut are epilogues, so every feature map in between is written once and read once.
"""

from __future__ import annotations

from torch import Tensor

from .. import autocast
from ..ops.fused_bottleneck import check
from .branch_conv2d import convolve
from .branch_depthwise_conv2d import convolve as convolve_depthwise
from .launch import op


@op
def fused_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    shortcut: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    replicate: int,
    activation: str,
    identity: bool,
    final_activation: str,
) -> Tensor:
    """See :func:`hne_kernels.fused_bottleneck`."""
    check(
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut, shortcut_bias,
        stride, replicate, activation, identity, final_activation,
    )  # fmt: skip
    x = x.contiguous()
    residual, residual_replicate = x if identity else None, replicate
    if shortcut is not None:
        residual = convolve(x, shortcut, shortcut_bias, stride, 0, replicate, packed=True)
        residual_replicate = 1
    y = convolve(x, expand, expand_bias, 1, 0, replicate, packed=True, activation=activation)
    filters = depthwise.permute(0, 3, 1, 2)
    padding = depthwise.shape[1] // 2
    y = convolve_depthwise(y, filters, depthwise_bias, stride, padding, 1, activation=activation)
    return convolve(
        y, project, project_bias, 1, 0, 1,
        packed=True, activation=final_activation, residual=residual, residual_replicate=residual_replicate,
    )  # fmt: skip


autocast.register("triton_fused_bottleneck")
