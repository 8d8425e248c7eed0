"""Mean and variance of a pointwise convolution that is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, checks, dispatch
from .stats_convolution import check_vector, no_double_backward, statistics_dtype


def branch_conv2d_moments(
    x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``conv(s)``, ``s = activation((x - mean) * scale + shift)``: those of
    :func:`branch_conv2d_stats`, without the map that they are of.

    On a CPU they are made of mean and covariance of ``s``: of ``W s`` the mean is ``W mean(s)`` and the variances are
    the diagonal of ``W cov(s) W^T``. That is quicker where the convolution writes at least twice as many channels as it
    reads, and :func:`branch_projection` then computes the map where it is used. Other backends compute the map here.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G, C_out, C_in, 1, 1]``, dtype of ``x``.
        mean, scale, shift: ``[G, C_in]``, float32 (float64 for a float64 ``x``).
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        Mean and biased variance ``[G, C_out]`` in the dtype of the statistics, 0 for an empty batch. Both are
        differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, mean, scale, shift, activation)
    check(*arguments)
    if dispatch.select(x) == "cpp":
        y_mean, y_var, _, _ = torch.ops.hne.branch_conv2d_moments(*arguments)
    else:
        _, y_mean, y_var = dispatch.implementation("branch_conv2d_stats", x)(*arguments, 1, 0, 1)
    return y_mean, y_var


def check(
    x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, activation: str
) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_conv2d_moments` and return the shape of the map."""
    checks.pointwise("weight", weight)
    shape = checks.convolution(x, weight, None, 1, 0, 1, depthwise=False)
    checks.activation("activation", activation)
    for name, vector in (("mean", mean), ("scale", scale), ("shift", shift)):
        check_vector(name, vector, x, x.shape[0], x.shape[4])
    return shape


@torch.library.register_fake("hne::branch_conv2d_moments")
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branches, *_, out_channels = check(x, weight, *rest)
    in_channels, dtype = x.shape[4], statistics_dtype(x)
    y_mean, y_var = (x.new_empty(branches, out_channels, dtype=dtype) for _ in range(2))
    return (
        y_mean,
        y_var,
        x.new_empty(branches, in_channels, dtype=dtype),
        x.new_empty(branches, out_channels, in_channels, dtype=dtype),
    )


@torch.library.register_fake("hne::branch_conv2d_moments_backward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, mean = arguments[4:7]
    vectors = [mean.new_empty(mean.shape) for _ in range(2)]
    return x.new_empty(x.shape), vectors[0], vectors[1], weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # of the product of weights and covariance they would be megabytes of zeros
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, *_: Any) -> tuple[Any, ...]:
    weight, mean = ctx.saved_tensors[3:5]
    grad_mean, grad_var = (mean.new_zeros(weight.shape[:2]) if grad is None else grad for grad in (grad_mean, grad_var))
    grad_x, grad_scale, grad_shift, grad_weight = torch.ops.hne.branch_conv2d_moments_backward(
        grad_mean, grad_var, *ctx.saved_tensors, ctx.activation
    )
    scale = ctx.saved_tensors[5]
    return grad_x, grad_weight, -scale * grad_shift, grad_scale, grad_shift, None


torch.library.register_autograd("hne::branch_conv2d_moments", _backward, setup_context=_setup)
no_double_backward("branch_conv2d_moments_backward", "branch_conv2d_moments")
autocast.register("branch_conv2d_moments", tensors=2)
