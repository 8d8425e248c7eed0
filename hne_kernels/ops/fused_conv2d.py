"""Convolution, folded batch norm, residual and activation in one op (inference)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
    residual_replicate: int = 1,
    activation: str = "none",
) -> Tensor:
    """``activation(branch_conv2d(x, weight, bias) + residual)`` with weights packed once by :func:`pack_weight`.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: packed filters ``[G', P, k, k, C_in, 16]``, dtype of ``x``.
        bias: ``[G', C_out]``; its length is the number of output channels.
        residual: features ``[ceil(G' / residual_replicate), B, H', W', C_out]``, dtype of ``x``, or None.
        stride, padding, replicate: as in :func:`branch_conv2d`.
        residual_replicate: output branch g adds branch ``g // residual_replicate`` of ``residual``.
        activation: ``none``, ``relu`` or ``relu6``.

    Returns:
        ``[G', B, H', W', C_out]``.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is required; this op is for inference.
    """
    checks.no_gradient("fused_conv2d", x, weight, bias, residual)
    checks.at_least("stride", stride, 1)  # PyTorch's dispatcher accepts True as a number
    checks.at_least("padding", padding, 0)
    checks.at_least("residual_replicate", residual_replicate, 1)
    op = dispatch.implementation("fused_conv2d", x, late_check=check)
    return op(x, weight, bias, stride, padding, replicate, activation, residual, residual_replicate)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    replicate: int,
    activation: str,
    residual: Tensor | None = None,
    residual_replicate: int = 1,
) -> tuple[int, ...]:
    """Check the arguments of :func:`fused_conv2d` and return the shape of the output."""
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    checks.same_kind("x", x, weight=weight, bias=bias)
    out_channels = checks.packed("weight", weight, "bias", bias, x.shape[4])
    checks.check_branches(x, weight, replicate)
    out = checks.geometry(x, weight.shape[0], out_channels, weight.shape[2], stride, padding)
    checks.at_least("residual_replicate", residual_replicate, 1)
    if residual is not None:
        parents = -(-out[0] // residual_replicate)
        checks.shape("residual", residual, (parents, *out[1:]), "[ceil(out_branches / residual_replicate), ...]")
        checks.same_kind("x", x, residual=residual)
    return out


@torch.library.register_fake("hne::fused_conv2d")
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(check(x, *rest))


autocast.register("fused_conv2d")
autograd.register_inference("fused_conv2d")
