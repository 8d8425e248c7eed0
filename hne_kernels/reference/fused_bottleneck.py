"""The convolutions of a bottleneck, one after another."""

from __future__ import annotations

from torch import Tensor

from .activation import activate
from .branch_conv2d import replicated
from .branch_depthwise_conv2d import branch_depthwise_conv2d
from .fused_conv2d import fused_conv2d


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
    y = fused_conv2d(x, expand, expand_bias, 1, 0, replicate, activation)
    filters = depthwise.permute(0, 3, 1, 2)
    y = branch_depthwise_conv2d(y, filters, depthwise_bias, stride, depthwise.shape[1] // 2, 1)
    y = fused_conv2d(activate(y, activation), project, project_bias, 1, 0, 1, "none")
    if shortcut is not None and shortcut_bias is not None:
        y = y + fused_conv2d(x, shortcut, shortcut_bias, stride, 0, replicate, "none")
    if identity:
        y = y + replicated(x, replicate, y.shape[0])
    return activate(y, final_activation)
