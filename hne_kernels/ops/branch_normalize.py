"""Normalisation by given statistics, residual sum and activation in one pass: the end of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks, dispatch
from .normalization import check_norm


def branch_normalize(
    x: Tensor,
    norm: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``activation((x - mean) * scale + shift + residual)``, per channel of each branch.

    The end of a block whose shortcut has a batch norm, too, is one pass with ``residual_norm``.

    Args:
        x: features ``[G, B, H, W, C]``.
        norm: ``[3, G, C]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``).
        residual: added before the activation, shape and dtype of ``x``, or None.
        residual_norm: like ``norm``, for a residual that is normalised where it is added,
            ``(residual - mean) * scale + shift``; or None.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        Like ``x``; differentiable any number of times, with respect to all tensors.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    check(x, norm, residual, residual_norm, activation)
    y: Tensor = dispatch.implementation("branch_normalize", x)(x, norm, residual, residual_norm, activation)
    return y


def check(x: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, activation: str) -> None:
    """Check the arguments of :func:`branch_normalize`."""
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    checks.same_kind("x", x)
    check_norm("norm", norm, x, x.shape[4])
    check_residual(x, residual, residual_norm)


def check_residual(x: Tensor, residual: Tensor | None, residual_norm: Tensor | None) -> None:
    """Raise unless ``residual`` can be added to ``x``, normalised by ``residual_norm`` if there is one."""
    if residual is not None:
        checks.shape("residual", residual, tuple(x.shape), "as x")
        checks.same_kind("x", x, residual=residual)
    elif residual_norm is not None:
        raise ValueError("residual: expected a tensor where residual_norm is given, got None")
    if residual_norm is not None:
        check_norm("residual_norm", residual_norm, x, x.shape[4])


@torch.library.register_fake("hne::branch_normalize")
def _(x: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, activation: str) -> Tensor:
    check(x, norm, residual, residual_norm, activation)
    return x.new_empty(x.shape)


@torch.library.register_fake("hne::branch_normalize_backward")
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    norm: Tensor,
    residual: Tensor | None,
    residual_norm: Tensor | None,
    activation: str,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        norm.new_empty(norm.shape),
        x.new_empty(x.shape if writes_residual(residual_norm, activation, has_residual) else 0),
        norm.new_empty(0 if residual_norm is None else norm.shape),
    )


def writes_residual(residual_norm: Tensor | None, activation: str, has_residual: bool) -> bool:
    """Whether the backward op writes the residual's gradient, which else is the gradient of the result itself."""
    return has_residual and (activation != "none" or residual_norm is not None)


def differentiate(op: str) -> None:
    """Register autograd of ``op``, whose gradient is the op ``op_backward``, and of that one."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, norm, residual, residual_norm, ctx.activation = inputs
        # y tells where the activation was flat. Without an activation it need not stay in memory.
        y = x if ctx.activation == "none" else output
        ctx.save_for_backward(x, y, norm, None if residual_norm is None else residual, residual_norm)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *saved, residual, residual_norm = ctx.saved_tensors
        _, _, need_residual, need_residual_norm, _ = ctx.needs_input_grad
        needed = need_residual or need_residual_norm
        if not needed:
            residual = residual_norm = None
        grad_x, grad_norm, grad_residual, grad_residual_norm = backward_op(
            grad, *saved, residual, residual_norm, ctx.activation, needed
        )
        if not writes_residual(residual_norm, ctx.activation, needed):
            grad_residual = grad
        return (
            grad_x,
            grad_norm,
            grad_residual if need_residual else None,
            grad_residual_norm if need_residual_norm else None,
            None,
        )

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.activation, ctx.has_residual = inputs
        ctx.save_for_backward(*tensors)

    autograd.register(op, backward, setup)
    autograd.register(f"{op}_backward", _double_backward, setup_backward)


def _double_backward(
    ctx: Any, of_x: Tensor, of_norm: Tensor, of_residual: Tensor, of_residual_norm: Tensor
) -> tuple[Any, ...]:
    """The gradient of the backward op in plain PyTorch: it is rarely needed, and differentiable again this way.

    The backward op computes, with m = grad where the activation is not flat: ``m * scale`` for x, and
    ``-scale * sum m``, ``sum m (x - mean)`` and ``sum m`` for the rows of norm. The residual has the gradient m or, if
    it is normalised, the same gradients as x with its own norm. The arguments are the gradients of these.
    """
    grad, x, y, norm, residual, residual_norm = ctx.saved_tensors
    flat = torch.zeros_like(y, dtype=torch.bool)
    if ctx.activation != "none":
        flat = (y <= 0) | (y >= 6) if ctx.activation == "relu6" else y <= 0
    masked = grad.masked_fill(flat, 0)
    of_masked, grad_x, grad_norm = _through_normalization(masked, x, norm, of_x, of_norm)
    grad_residual = grad_residual_norm = None
    if residual_norm is not None:
        more, grad_residual, grad_residual_norm = _through_normalization(
            masked, residual, residual_norm, of_residual, of_residual_norm
        )
        of_masked = of_masked + more
    elif writes_residual(None, ctx.activation, ctx.has_residual):
        of_masked = of_masked + of_residual
    return (
        of_masked.masked_fill(flat, 0).to(grad.dtype),
        *(grad_x, None, grad_norm, grad_residual, grad_residual_norm),
        *(None, None),
    )


def _through_normalization(
    masked: Tensor, x: Tensor, norm: Tensor, of_x: Tensor, of_norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``masked``, ``x`` and ``norm`` from those of the gradients of ``x`` and ``norm``."""
    mean, scale, _ = norm[:, :, None, None, None].unbind()
    of_mean, of_scale, of_shift = of_norm[:, :, None, None, None].unbind()
    of_masked = of_x * scale + of_scale * (x - mean) + of_shift - of_mean * scale
    over = (1, 2, 3)
    grad_mean = -(masked * of_scale).sum(over)
    grad_scale = (masked * (of_x - of_mean)).sum(over).to(norm.dtype)
    grad_norm = torch.stack([grad_mean, grad_scale, torch.zeros_like(grad_mean)])
    return of_masked, (masked * of_scale).to(x.dtype), grad_norm


differentiate("branch_normalize")
