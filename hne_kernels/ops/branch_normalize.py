"""Normalisation by given statistics, the residual sum and the activation in one pass: the end of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch
from .stats_convolution import check_normalization, statistics_dtype


def branch_normalize(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``activation((x - mean) * scale + shift + residual)``, per channel of each branch.

    Args:
        x: features ``[G, B, H, W, C]``.
        mean, scale, shift: ``[G, C]``, float32 (float64 for a float64 ``x``).
        residual: added before the activation, shape and dtype of ``x``, or None.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        Like ``x``; differentiable any number of times, by all tensors.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    check(x, mean, scale, shift, residual, activation)
    y: Tensor = dispatch.implementation("branch_normalize", x)(x, mean, scale, shift, residual, activation)
    return y


def check(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> None:
    """Raise unless the arguments are those of :func:`branch_normalize`."""
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    check_normalization(x, mean, scale, shift)
    if residual is not None:
        checks.shape("residual", residual, tuple(x.shape), "as x")
        checks.same_kind("x", x, residual=residual)


@torch.library.register_fake("hne::branch_normalize")
def _(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    check(x, mean, scale, shift, residual, activation)
    return x.new_empty(x.shape)


@torch.library.register_fake("hne::branch_normalize_backward")
def _(
    grad: Tensor, x: Tensor, y: Tensor, mean: Tensor, scale: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = [x.new_empty(mean.shape, dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), vectors[0], vectors[1], x.new_empty(0 if activation == "none" else x.shape)


def differentiate(op: str) -> None:
    """Register autograd of ``op``, whose gradient is the op ``op_backward``, and of that."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, mean, scale, _, _, ctx.activation = inputs
        # The sign of y tells where the activation was flat; without one y need not be kept.
        ctx.save_for_backward(x, x if ctx.activation == "none" else output, mean, scale)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, mean, scale = ctx.saved_tensors
        grad_x, grad_scale, grad_shift, grad_residual = backward_op(grad, x, y, mean, scale, ctx.activation)
        if not ctx.needs_input_grad[4]:
            grad_residual = None
        elif ctx.activation == "none":
            grad_residual = grad
        return grad_x, -scale * grad_shift, grad_scale, grad_shift, grad_residual, None

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    torch.library.register_autograd(f"hne::{op}", backward, setup_context=setup)
    torch.library.register_autograd(f"hne::{op}_backward", _double_backward, setup_context=setup_backward)


def _double_backward(
    ctx: Any, of_x: Tensor, of_scale: Tensor, of_shift: Tensor, of_residual: Tensor
) -> tuple[Any, ...]:
    """The gradient of the gradient, in plain PyTorch: it is seldom asked for, and has all its own gradients so.

    With m = grad where the activation is not flat, the results are m * scale, sum m (x - mean), sum m, and m.
    """
    grad, x, y, mean, scale = ctx.saved_tensors
    flat = torch.zeros_like(y, dtype=torch.bool)
    if ctx.activation != "none":
        flat = (y <= 0) | (y >= 6) if ctx.activation == "relu6" else y <= 0
    masked = grad.masked_fill(flat, 0)
    wide_mean, wide_scale, wide_of_scale, wide_of_shift = (
        vector[:, None, None, None] for vector in (mean, scale, of_scale, of_shift)
    )
    of_masked = of_x * wide_scale + wide_of_scale * (x - wide_mean) + wide_of_shift
    if ctx.activation != "none":
        of_masked = of_masked + of_residual
    over = (1, 2, 3)
    return (
        of_masked.masked_fill(flat, 0).to(grad.dtype),
        (masked * wide_of_scale).to(x.dtype),
        None,
        -(masked * wide_of_scale).sum(over),
        (masked * of_x).sum(over).to(scale.dtype),
        None,
    )


differentiate("branch_normalize")
