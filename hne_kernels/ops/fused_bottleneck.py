"""A whole bottleneck or inverted residual in one op (inference)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch


def fused_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    shortcut: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    *,
    stride: int = 1,
    replicate: int = 1,
    activation: str = "relu",
    identity: bool = False,
    final_activation: str = "none",
) -> Tensor:
    """1x1 conv, depthwise conv, 1x1 conv and shortcut; the expanded feature map never leaves the cache.

    Computes ``final_activation(project(activation(depthwise(activation(expand(x))))) + shortcut)``, with batch norms
    folded into the weights. ResNet's bottleneck (Table 2) has ``activation = final_activation = "relu"``, the inverted
    residual (Table 3) ``"relu6"`` and ``"none"``.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        expand: packed 1x1 filters ``[G', P, 1, 1, C_in, 16]``; expand_bias ``[G', M]``.
        depthwise: filters ``[G', k, k, M]``, k odd, channels last; depthwise_bias ``[G', M]``. This convolution has
            the stride, and padding ``k // 2``.
        project: packed 1x1 filters ``[G', P, 1, 1, M, 16]``; project_bias ``[G', C_out]``.
        shortcut: packed 1x1 filters of a convolution of ``x``, with the stride, or None; shortcut_bias ``[G', C_out]``.
        stride, replicate: as in :func:`branch_conv2d`.
        activation: after the first two convolutions: ``none``, ``relu`` or ``relu6``.
        identity: add x itself (needs stride 1 and ``C_in == C_out``, and no ``shortcut``).
        final_activation: after the addition.

    Returns:
        ``[G', B, H', W', C_out]``.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is required; this op is for inference.
    """
    weights = (expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut, shortcut_bias)
    checks.no_gradient("fused_bottleneck", x, *weights)
    checks.at_least("stride", stride, 1)  # PyTorch's dispatcher accepts True as a number
    op = dispatch.implementation("fused_bottleneck", x, late_check=check)
    return op(x, *weights, stride, replicate, activation, identity, final_activation)


def check(
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
) -> tuple[int, ...]:
    """Check the arguments of :func:`fused_bottleneck` and return the shape of the output."""
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    checks.activation("final_activation", final_activation)
    checks.same_kind(
        "x",
        x,
        expand=expand,
        expand_bias=expand_bias,
        depthwise=depthwise,
        depthwise_bias=depthwise_bias,
        project=project,
        project_bias=project_bias,
        shortcut=shortcut,
        shortcut_bias=shortcut_bias,
    )
    middle = checks.packed("expand", expand, "expand_bias", expand_bias, x.shape[4])
    checks.check_branches(x, expand, replicate)
    branches, channels = expand.shape[0], x.shape[4]
    out_channels = checks.packed("project", project, "project_bias", project_bias, middle)
    checks.rank("depthwise", depthwise, 4, "[out_branches, k, k, middle]")
    kernel_size = depthwise.shape[1]
    if kernel_size % 2 == 0:
        raise ValueError(f"depthwise: expected an odd kernel size, got {kernel_size}")
    checks.shape(
        "depthwise",
        depthwise,
        (branches, kernel_size, kernel_size, middle),
        "[out_branches, k, k, middle]",
    )
    checks.shape("depthwise_bias", depthwise_bias, (branches, middle), "[out_branches, middle]")
    for name, weight in (("expand", expand), ("project", project), ("shortcut", shortcut)):
        if weight is None:
            continue
        if weight.shape[0] != branches or (weight.dim() == 6 and weight.shape[2] != 1):
            raise ValueError(f"{name}: expected {branches} branches and a 1x1 kernel, got shape {tuple(weight.shape)}")
    if (shortcut is None) != (shortcut_bias is None):
        raise ValueError("shortcut: expected both shortcut and shortcut_bias, or neither")
    if shortcut is not None and shortcut_bias is not None:
        if identity:
            raise ValueError("identity: expected False where a shortcut convolution is given, got True")
        shortcut_channels = checks.packed("shortcut", shortcut, "shortcut_bias", shortcut_bias, channels)
        if shortcut_channels != out_channels:
            raise ValueError(
                f"shortcut: expected {out_channels} output channels as project has, got {shortcut_channels}"
            )
    if identity and (stride != 1 or channels != out_channels):
        raise ValueError(
            f"identity: expected stride 1 and equal channels, got stride {stride} and {channels} > {out_channels}"
        )
    return checks.geometry(x, branches, out_channels, kernel_size, stride, kernel_size // 2)


@torch.library.register_fake("hne::fused_bottleneck")
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(check(x, *rest))


autocast.register("fused_bottleneck")
autograd.register_inference("fused_bottleneck")
