"""Normalisation by given statistics, the residual sum and the activation in one pass: the end of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .stats_convolution import check_normalization, no_double_backward, statistics_dtype


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
        Like ``x``; differentiable once, by all tensors.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
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
    """Register autograd of ``op``, whose gradient is the op ``op_backward``."""
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

    torch.library.register_autograd(f"hne::{op}", backward, setup_context=setup)
    no_double_backward(f"{op}_backward", op)


differentiate("branch_normalize")
