"""Convolution of a feature map that is normalised where it is read, and the batch statistics of the output."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch
from .branch_normalize import check_residual
from .normalization import check_norm, no_double_backward, statistics_dtype


@overload
def branch_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    *,
    residual: None = None,
    residual_norm: None = None,
    activation: str = "none",
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
    materialize: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def branch_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    activation: str = "none",
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
    materialize: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def branch_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    activation: str = "none",
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
    materialize: bool = False,
) -> tuple[Tensor, ...]:
    """``y = conv(z)`` with mean and variance of ``y``; ``z = activation((x - mean) * scale + shift + residual)``.

    Two convolutions with a batch norm (Ioffe & Szegedy 2015) between them need no normalised feature map in memory:
    the first one gives the statistics, from which follow ``scale = weight / sqrt(var + eps)`` and ``shift = bias``, and
    the second one normalises its input where it reads it. The padding is zero after the activation.

    With ``materialize``, ``z`` is a result, too, for other readers, and may include a residual: the end of one
    bottleneck and the convolution that begins the next. The backward pass adds the gradient of ``z`` to the
    convolution's where it writes it, so that the two need no pass over memory of their own.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G', C_out, C_in, k, k]``, or ``[G', C, k, k]`` for a depthwise convolution; dtype of ``x``.
        norm: ``[3, G, C_in]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``); or None to read
            ``x`` as it is.
        residual: added before the activation, shape and dtype of ``x``, or None; only with ``materialize``.
        residual_norm: like ``norm``, for a residual that is normalised where it is added; or None.
        activation: ``none``, ``relu`` or ``relu6`` of the normalised ``x``.
        stride, padding, replicate: as in :func:`branch_conv2d`.
        materialize: also return ``z``; needs a ``norm`` and a dense convolution.

    Returns:
        ``(y, mean, var)``, or ``(z, y, mean, var)`` with ``materialize``. y ``[G', B, H', W', C_out]``; its mean and
        biased variance over batch, height and width ``[G', C_out]``, float32 (float64 for float64), 0 for an empty
        batch; z like ``x``. All are differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, norm, residual, residual_norm, activation, stride, padding, replicate, materialize)
    check(*arguments)
    y, mean, var, z = dispatch.implementation("branch_norm_conv2d", x)(*arguments)
    return (z, y, mean, var) if materialize else (y, mean, var)


def check(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    activation: str,
    stride: int,
    padding: int,
    replicate: int,
    materialize: bool,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_norm_conv2d` and return the shape of ``y``."""
    depthwise = isinstance(weight, Tensor) and weight.dim() == 4 and not materialize
    shape = checks.convolution(x, weight, None, stride, padding, replicate, depthwise=depthwise)
    checks.activation("activation", activation)
    if norm is not None:
        check_norm("norm", norm, x, x.shape[4])
    elif activation != "none":
        raise ValueError(f"activation: expected none where x is not normalised (no norm given), got {activation!r}")
    if materialize:
        if norm is None:
            raise ValueError("norm: expected a tensor with materialize, got None")
        check_residual(x, residual, residual_norm)
        return shape
    for name, tensor in (("residual", residual), ("residual_norm", residual_norm)):
        if tensor is not None:
            raise ValueError(f"{name}: expected None without materialize, got a tensor")
    return shape


@torch.library.register_fake("hne::branch_norm_conv2d")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = check(x, *rest)
    mean, var = (x.new_empty(shape[0], shape[4], dtype=statistics_dtype(x)) for _ in range(2))
    return x.new_empty(shape), mean, var, x.new_empty(x.shape if rest[-1] else 0)


@torch.library.register_fake("hne::branch_norm_conv2d_backward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight, norm, _, residual_norm = arguments[7:12]
    has_residual, need_input, need_weight = arguments[-3:]
    return (
        x.new_empty(x.shape if need_input else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        x.new_empty(0 if norm is None or not need_input else norm.shape, dtype=statistics_dtype(x)),
        x.new_empty(x.shape if need_input and has_residual else 0),
        x.new_empty(0 if residual_norm is None or not need_input else residual_norm.shape, dtype=statistics_dtype(x)),
    )


def differentiate(op: str) -> None:
    """Register autograd and autocast of ``op``, whose gradient is the op ``op_backward``."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, norm, residual, residual_norm, *ctx.options, materialize = inputs
        y, y_mean, _, z = output
        ctx.has_residual = residual is not None
        needed = None if residual_norm is None else residual  # the gradient of a plain sum does not need its terms
        ctx.save_for_backward(y, y_mean, z if materialize else None, x, weight, norm, needed, residual_norm)

    def backward(ctx: Any, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
        need_x, need_weight, *need_others = ctx.needs_input_grad[:5]
        need_input = need_x or any(need_others)
        y, y_mean, z, x, weight, norm, residual, residual_norm = ctx.saved_tensors
        grad_x, grad_weight, grad_norm, grad_residual, grad_residual_norm = backward_op(
            *(grad_y, grad_mean, grad_var, None if z is None else grad_z, y, y_mean, z, x, weight, norm),
            *(residual, residual_norm, *ctx.options, ctx.has_residual, need_input, need_weight),
        )
        return (
            grad_x if need_input else None,
            grad_weight if need_weight else None,
            grad_norm if need_input and norm is not None else None,
            grad_residual if need_input and ctx.has_residual else None,
            grad_residual_norm if need_input and residual_norm is not None else None,
            *(None,) * 5,
        )

    autograd.register(op, backward, setup)
    no_double_backward(f"{op}_backward", op)
    autocast.register(op, cast=("x", "weight", "residual"))


differentiate("branch_norm_conv2d")
