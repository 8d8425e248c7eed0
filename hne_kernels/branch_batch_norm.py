"""Batch normalisation with batch statistics, the residual sum and the activation in one op (training)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch


def branch_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with statistics of this batch.

    Mean and (biased) variance are over batch, height and width, for every channel of every branch
    (Ioffe & Szegedy 2015). They are returned for the running statistics and carry no gradient.

    Args:
        x: features ``[G, B, H, W, C]``.
        weight, bias: ``[G, C]``; float32 for a bfloat16 ``x``, else its dtype.
        residual: added before the activation, shape of ``x``, or None.
        activation: ``none``, ``relu`` or ``relu6``.
        eps: added to the variance, positive.

    Returns:
        ``(y, mean, var)``: y like ``x``; mean and var ``[G, C]`` in the dtype of ``weight``.

    Raises:
        ValueError: a shape does not fit, or there is only one value per channel.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    checks.batch_norm(x, weight, bias, residual, activation, eps)
    op = dispatch.implementation("branch_batch_norm", x)
    return op(x, weight, bias, residual, activation, eps)


@torch.library.register_fake("hne::branch_batch_norm")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.batch_norm(x, weight, bias, residual, activation, eps)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("hne::branch_batch_norm_backward")
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: bool,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = x.new_empty(x.shape if residual else (0,))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape), grad_residual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, ctx.activation, ctx.eps = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.residual = residual is not None
    # The sign of y tells where the activation was flat; without one y need not be kept.
    ctx.save_for_backward(x, x if ctx.activation == "none" else y, weight, mean, var)


def differentiate(op: str) -> None:
    """Register autograd of ``op``, and that ``op_backward`` has none."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        grad_x, grad_weight, grad_bias, grad_residual = backward_op(
            grad, *ctx.saved_tensors, ctx.residual, ctx.activation, ctx.eps
        )
        return grad_x, grad_weight, grad_bias, grad_residual if ctx.residual else None, None, None

    torch.library.register_autograd(f"hne::{op}", backward, setup_context=_setup_context)
    torch.library.register_autograd(f"hne::{op}_backward", _double_backward)


def _double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "branch_batch_norm: double backward is not implemented; use the reference backend, "
        'with hne_kernels.use_backend("reference")'
    )


differentiate("branch_batch_norm")
