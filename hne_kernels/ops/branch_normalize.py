"""Normalisation by given statistics, residual sum and activation in one pass: the end of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks, dispatch
from .normalization import check_norm


def branch_normalize(x: Tensor, norm: Tensor, *, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation((x - mean) * scale + shift + residual)``, per channel of each branch.

    Args:
        x: features ``[G, B, H, W, C]``.
        norm: ``[3, G, C]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``).
        residual: added before the activation, shape and dtype of ``x``, or None.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        Like ``x``; differentiable any number of times, with respect to all tensors.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    check(x, norm, residual, activation)
    y: Tensor = dispatch.implementation("branch_normalize", x)(x, norm, residual, activation)
    return y


def check(x: Tensor, norm: Tensor, residual: Tensor | None, activation: str) -> None:
    """Check the arguments of :func:`branch_normalize`."""
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    checks.same_kind("x", x, residual=residual)
    check_norm("norm", norm, x, x.shape[4])
    if residual is not None:
        checks.shape("residual", residual, tuple(x.shape), "as x")


@torch.library.register_fake("hne::branch_normalize")
def _(x: Tensor, norm: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    check(x, norm, residual, activation)
    return x.new_empty(x.shape)


@torch.library.register_fake("hne::branch_normalize_backward")
def _(grad: Tensor, x: Tensor, y: Tensor, norm: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), norm.new_empty(norm.shape), x.new_empty(0 if activation == "none" else x.shape)


def differentiate(op: str) -> None:
    """Register autograd of ``op``, whose gradient is the op ``op_backward``, and of that one."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, norm, _, ctx.activation = inputs
        # y tells where the activation was flat. Without an activation it need not stay in memory.
        ctx.save_for_backward(x, x if ctx.activation == "none" else output, norm)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x, grad_norm, grad_residual = backward_op(grad, *ctx.saved_tensors, ctx.activation)
        if not ctx.needs_input_grad[2]:
            grad_residual = None
        elif ctx.activation == "none":
            grad_residual = grad
        return grad_x, grad_norm, grad_residual, None

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    autograd.register(op, backward, setup)
    autograd.register(f"{op}_backward", _double_backward, setup_backward)


def _double_backward(ctx: Any, of_x: Tensor, of_norm: Tensor, of_residual: Tensor) -> tuple[Any, ...]:
    """The gradient of the backward op in plain PyTorch: it is rarely needed, and differentiable again this way.

    The backward op computes, with m = grad where the activation is not flat: ``m * scale`` for x, ``-scale * sum m``,
    ``sum m (x - mean)`` and ``sum m`` for the rows of norm, and m for the residual. The arguments are the gradients of
    these.
    """
    grad, x, y, norm = ctx.saved_tensors
    flat = torch.zeros_like(y, dtype=torch.bool)
    if ctx.activation != "none":
        flat = (y <= 0) | (y >= 6) if ctx.activation == "relu6" else y <= 0
    masked = grad.masked_fill(flat, 0)
    mean, scale, _ = norm[:, :, None, None, None].unbind()
    of_mean, of_scale, of_shift = of_norm[:, :, None, None, None].unbind()
    of_masked = of_x * scale + of_scale * (x - mean) + of_shift - of_mean * scale
    if ctx.activation != "none":
        of_masked = of_masked + of_residual
    over = (1, 2, 3)
    grad_mean = -(masked * of_scale).sum(over)
    grad_scale = (masked * (of_x - of_mean)).sum(over).to(norm.dtype)
    return (
        of_masked.masked_fill(flat, 0).to(grad.dtype),
        (masked * of_scale).to(x.dtype),
        None,
        torch.stack([grad_mean, grad_scale, torch.zeros_like(grad_mean)]),
        None,
    )


differentiate("branch_normalize")
