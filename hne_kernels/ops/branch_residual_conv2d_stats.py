"""The end of one bottleneck and the convolution that begins the next, which reads the map where it is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, checks, dispatch
from .branch_normalize import check as check_normalize
from .stats_convolution import no_double_backward, statistics_dtype


def branch_residual_conv2d_stats(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z = activation((x - mean) * scale + shift + residual)``, ``y = conv(z)``, and mean and variance of ``y``.

    :func:`branch_normalize` and :func:`branch_conv2d_stats` (of one pixel, stride 1, without replication), in one pass
    over the maps on a CPU. So is the way back: the gradients of ``z`` as a result and by way of ``y`` are added,
    masked by the activation and summed for ``scale`` and ``shift`` where they are made.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G, C_out, C_in, 1, 1]``, dtype of ``x``.
        mean, scale, shift: ``[G, C_in]``, float32 (float64 for a float64 ``x``).
        residual: added before the activation, shape and dtype of ``x``, or None.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        ``(z, y, mean, var)``: z like x; y ``[G, B, H, W, C_out]``; its mean and biased variance ``[G, C_out]`` in the
        dtype of the statistics, 0 for an empty batch. All four are differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, residual, mean, scale, shift, activation)
    check(*arguments)
    if dispatch.select(x) == "cpp":
        z, y, y_mean, y_var = torch.ops.hne.branch_residual_conv2d_stats(*arguments)
    else:
        z = dispatch.implementation("branch_normalize", x)(x, mean, scale, shift, residual, activation)
        unit = dispatch.implementation("branch_conv2d_stats", x)
        y, y_mean, y_var = unit(z, weight, None, None, None, "none", 1, 0, 1)
    return z, y, y_mean, y_var


def check(
    x: Tensor, weight: Tensor, residual: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor, activation: str
) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_residual_conv2d_stats` and return the shape of ``y``."""
    check_normalize(x, mean, scale, shift, residual, activation)
    checks.pointwise("weight", weight)
    return checks.convolution(x, weight, None, 1, 0, 1, depthwise=False)


@torch.library.register_fake("hne::branch_residual_conv2d_stats")
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = check(x, weight, *rest)
    statistics = [x.new_empty(shape[0], shape[4], dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), x.new_empty(shape), statistics[0], statistics[1]


@torch.library.register_fake("hne::branch_residual_conv2d_stats_backward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight, mean, has_residual = (arguments[i] for i in (7, 8, 9, 13))
    vectors = [mean.new_empty(mean.shape) for _ in range(2)]
    grad_residual = x.new_empty(x.shape if has_residual else 0)
    return x.new_empty(x.shape), vectors[0], vectors[1], grad_residual, weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, mean, scale, shift, ctx.activation = inputs
    z, y, y_mean, _ = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(z, y, y_mean, x, weight, mean, scale, shift)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    grad_x, grad_scale, grad_shift, grad_residual, grad_weight = torch.ops.hne.branch_residual_conv2d_stats_backward(
        *grads, *ctx.saved_tensors, ctx.activation, ctx.has_residual
    )
    scale = ctx.saved_tensors[6]
    residual = grad_residual if ctx.has_residual else None
    return grad_x, grad_weight, residual, -scale * grad_shift, grad_scale, grad_shift, None


torch.library.register_autograd("hne::branch_residual_conv2d_stats", _backward, setup_context=_setup)
no_double_backward("branch_residual_conv2d_stats_backward", "branch_residual_conv2d_stats")
autocast.register("branch_residual_conv2d_stats", tensors=3)
