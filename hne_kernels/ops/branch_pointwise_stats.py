"""Mean and variance of a pointwise convolution that is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch
from .normalization import check_norm, no_double_backward, statistics_dtype


def branch_pointwise_stats(
    x: Tensor, weight: Tensor, norm: Tensor, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``conv(s)``, ``s = activation((x - mean) * scale + shift)``, without the feature map.

    A CPU takes them from mean and covariance of ``s``: the mean of ``W s`` is ``W mean(s)``, and the variances are the
    diagonal of ``W cov(s) W^T``. That is faster where the convolution has at least twice as many output channels as
    input channels; :func:`branch_pointwise_norm_conv2d` then computes ``conv(s)`` where it is read. Other backends
    compute ``conv(s)`` here.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G, C_out, C_in, 1, 1]``, dtype of ``x``.
        norm: ``[3, G, C_in]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``).
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        ``(mean, var)``: mean and biased variance ``[G, C_out]`` in the dtype of ``norm``, 0 for an empty batch. Both
        are differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    check(x, weight, norm, activation)
    mean, var, *_ = dispatch.implementation("branch_pointwise_stats", x)(x, weight, norm, activation)
    return mean, var


def check(x: Tensor, weight: Tensor, norm: Tensor, activation: str) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_pointwise_stats` and return the shape of the convolution's output."""
    checks.pointwise("weight", weight)
    shape = checks.convolution(x, weight, None, 1, 0, 1, depthwise=False)
    checks.activation("activation", activation)
    check_norm("norm", norm, x, x.shape[4])
    return shape


def _compose(x: Tensor, weight: Tensor, norm: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    convolve = dispatch.implementation("branch_norm_conv2d", x)
    _, mean, var, _ = convolve(x, weight, norm, None, None, activation, 1, 0, 1, False)
    return mean, var


dispatch.register("branch_pointwise_stats", _compose, "reference", "cuda", "triton")


@torch.library.register_fake("hne::branch_pointwise_stats")
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


@torch.library.register_fake("hne::branch_pointwise_stats_backward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, norm = arguments[4:7]
    return x.new_empty(x.shape), weight.new_empty(weight.shape), norm.new_empty(norm.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros for the gradient of the product would take megabytes
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks them once
    *_, weight, norm = saved
    grad_mean, grad_var = (norm.new_zeros(weight.shape[:2]) if grad is None else grad for grad in (grad_mean, grad_var))
    gradients = torch.ops.hne.branch_pointwise_stats_backward(grad_mean, grad_var, *saved, ctx.activation)
    return *gradients, None


autograd.register("branch_pointwise_stats", _backward, _setup)
no_double_backward("branch_pointwise_stats_backward", "branch_pointwise_stats")
autocast.register("branch_pointwise_stats", cast=("x", "weight"))
