"""Shape inference, autograd and autocast of the branch convolutions, three ops each.

A convolution and its two gradients are the three contractions of one trilinear form ``sum(grad * conv(x, weight))``.
The derivatives of each one are therefore the other two, and any order of differentiation is right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks


def register(op: str, *, depthwise: bool) -> None:
    """Register fake, autograd and autocast of ``op``, ``op_backward_input`` and ``op_backward_weight``."""

    @torch.library.register_fake(f"hne::{op}")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int) -> Tensor:
        return x.new_empty(checks.convolution(x, weight, bias, stride, padding, replicate, depthwise=depthwise))

    @torch.library.register_fake(f"hne::{op}_backward_input")
    def _(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, replicate: int) -> Tensor:
        channels = weight.shape[1] if depthwise else weight.shape[2]
        parents = -(-grad.shape[0] // replicate)
        return grad.new_empty(parents, grad.shape[1], height, width, channels)

    @torch.library.register_fake(f"hne::{op}_backward_weight")
    def _(grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int) -> Tensor:
        channels = (grad.shape[4],) if depthwise else (grad.shape[4], x.shape[4])
        return grad.new_empty(grad.shape[0], *channels, kernel_size, kernel_size)

    differentiate(op)


def differentiate(op: str) -> None:
    """Register autograd and autocast of ``op``, ``op_backward_input`` and ``op_backward_weight``."""
    ops = torch.ops.hne
    forward = getattr(ops, op)
    backward_input = getattr(ops, f"{op}_backward_input")
    backward_weight = getattr(ops, f"{op}_backward_weight")

    def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    def differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = backward_input(grad, weight, x.shape[2], x.shape[3], *ctx.geometry) if need_x else None
        grad_weight = backward_weight(grad, x, weight.shape[-1], *ctx.geometry) if need_weight else None
        grad_bias = grad.sum((1, 2, 3)) if need_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None

    def setup_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, weight, _, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, weight)

    def differentiate_input(ctx: Any, x: Tensor) -> tuple[Any, ...]:
        grad, weight = ctx.saved_tensors
        need_grad, need_weight = ctx.needs_input_grad[:2]
        grad_grad = forward(x, weight, None, *ctx.geometry) if need_grad else None
        grad_weight = backward_weight(grad, x, weight.shape[-1], *ctx.geometry) if need_weight else None
        return grad_grad, grad_weight, None, None, None, None, None

    def setup_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, x)

    def differentiate_weight(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        grad, x = ctx.saved_tensors
        need_grad, need_x = ctx.needs_input_grad[:2]
        grad_grad = forward(x, weight, None, *ctx.geometry) if need_grad else None
        grad_x = backward_input(grad, weight, x.shape[2], x.shape[3], *ctx.geometry) if need_x else None
        return grad_grad, grad_x, None, None, None, None

    for name, setup, backward in (
        (op, setup_forward, differentiate_forward),
        (f"{op}_backward_input", setup_input, differentiate_input),
        (f"{op}_backward_weight", setup_weight, differentiate_weight),
    ):
        autograd.register(name, backward, setup)
        autocast.register(name)
