"""The end of a bottleneck from the feature map before its last convolution, and the convolution after it."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch
from .branch_pointwise_stats import check as check_convolution
from .normalization import check_norm, no_double_backward, statistics_dtype


@overload
def branch_pointwise_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    out_norm: Tensor,
    *,
    activation: str = "none",
    out_activation: str = "none",
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    next_weight: None = None,
) -> tuple[Tensor, None, None, None]: ...


@overload
def branch_pointwise_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    out_norm: Tensor,
    *,
    activation: str = "none",
    out_activation: str = "none",
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    next_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def branch_pointwise_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    out_norm: Tensor,
    *,
    activation: str = "none",
    out_activation: str = "none",
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    next_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``z = out_activation((conv(s) - out_mean) * out_scale + out_shift + residual)``, and ``y = next_conv(z)``.

    Here ``s = activation((x - mean) * scale + shift)``. With a ``next_weight`` there are ``y`` and its mean and
    variance, too. The statistics of ``conv(s)`` come from :func:`branch_pointwise_stats`. On a CPU the wide feature map
    ``conv(s)`` is never written, not even for the backward pass, which derives its sums from ``s``. Other backends
    compute one op after the other.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G, C_out, C_in, 1, 1]``, dtype of ``x``.
        norm: ``[3, G, C_in]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``).
        out_norm: the same for the channels of ``conv(s)``, ``[3, G, C_out]``.
        activation, out_activation: ``none``, ``relu`` or ``relu6``.
        residual: added before the activation, ``[G, B, H, W, C_out]``, dtype of ``x``, or None.
        residual_norm: like ``out_norm``, for a residual that is normalised where it is read; or None.
        next_weight: filters ``[G, C_next, C_out, 1, 1]``, dtype of ``x``, or None.

    Returns:
        ``(z, y, mean, var)``: z ``[G, B, H, W, C_out]``; y ``[G, B, H, W, C_next]``, its mean and biased variance
        ``[G, C_next]`` in the dtype of ``norm``, 0 for an empty batch; None without a ``next_weight``. All are
        differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, norm, activation, out_norm, out_activation, residual, residual_norm, next_weight)
    check(*arguments)
    z, *rest = dispatch.implementation("branch_pointwise_norm_conv2d", x)(*arguments)
    return (z, *rest) if next_weight is not None else (z, None, None, None)


def check(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    activation: str,
    out_norm: Tensor,
    out_activation: str,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    next_weight: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_pointwise_norm_conv2d` and return the shape of ``z``."""
    shape = check_convolution(x, weight, norm, activation)
    checks.activation("out_activation", out_activation)
    check_norm("out_norm", out_norm, x, shape[4])
    if residual_norm is not None:
        check_norm("residual_norm", residual_norm, x, shape[4])
    if residual is not None:
        checks.shape("residual", residual, shape, "as the convolution's output")
        checks.same_kind("x", x, residual=residual)
    elif residual_norm is not None:
        raise ValueError("residual: expected a tensor where residual_norm is given, got None")
    if next_weight is not None:
        checks.pointwise("next_weight", next_weight)
        expected = (shape[0], next_weight.shape[1], shape[4], 1, 1)
        checks.shape("next_weight", next_weight, expected, "[branches, next_channels, out_channels, 1, 1]")
        checks.same_kind("x", x, next_weight=next_weight)
    return shape


def _compose(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    activation: str,
    out_norm: Tensor,
    out_activation: str,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    next_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    convolve = dispatch.implementation("branch_norm_conv2d", x)
    wide = convolve(x, weight, norm, None, None, activation, 1, 0, 1, False)[0]
    end = (residual, residual_norm, out_activation)
    if next_weight is None:
        return (dispatch.implementation("branch_normalize", x)(wide, out_norm, *end),)
    y, mean, var, z = convolve(wide, next_weight, out_norm, *end, 1, 0, 1, True)
    return z, y, mean, var


dispatch.register("branch_pointwise_norm_conv2d", _compose, "reference", "cuda", "triton")


@torch.library.register_fake("hne::branch_pointwise_norm_conv2d")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, next_weight = check(x, *rest), rest[-1]
    channels = 0 if next_weight is None else next_weight.shape[1]
    mean, var = (x.new_empty(shape[0], channels, dtype=statistics_dtype(x)) for _ in range(2))
    return x.new_empty(shape), x.new_empty(*shape[:4], channels), mean, var


@torch.library.register_fake("hne::branch_pointwise_norm_conv2d_backward")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    z, (x, weight, norm, _, out_norm) = arguments[4], arguments[7:12]
    residual_norm, next_weight, has_residual = arguments[-3:]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        norm.new_empty(norm.shape),
        norm.new_empty(out_norm.shape),
        x.new_empty(z.shape if has_residual else 0),
        norm.new_empty(0 if residual_norm is None else residual_norm.shape),
        x.new_empty(0 if next_weight is None else next_weight.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, norm, ctx.activation, out_norm, ctx.out_activation, residual, residual_norm, next_weight = inputs
    z, y, y_mean, _ = output
    ctx.has_residual = residual is not None
    needed = None if residual_norm is None else residual  # the gradient of a plain sum does not need its terms
    ctx.save_for_backward(z, y, y_mean, x, weight, norm, out_norm, needed, residual_norm, next_weight)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *saved, out_norm, residual, residual_norm, next_weight = ctx.saved_tensors
    grad_x, grad_weight, grad_norm, grad_out_norm, grad_residual, grad_residual_norm, grad_next_weight = (
        torch.ops.hne.branch_pointwise_norm_conv2d_backward(
            *(*grads, *saved, ctx.activation, out_norm, ctx.out_activation),
            *(residual, residual_norm, next_weight, ctx.has_residual),
        )
    )
    return (
        *(grad_x, grad_weight, grad_norm, None, grad_out_norm, None),
        grad_residual if ctx.has_residual else None,
        None if residual_norm is None else grad_residual_norm,
        None if next_weight is None else grad_next_weight,
    )


autograd.register("branch_pointwise_norm_conv2d", _backward, _setup)
no_double_backward("branch_pointwise_norm_conv2d_backward", "branch_pointwise_norm_conv2d")
autocast.register("branch_pointwise_norm_conv2d", cast=("x", "weight", "residual", "next_weight"))
