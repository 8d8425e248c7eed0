"""Logits of the nested ensembles: means over the first n members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks, dispatch

LAYOUT = "[models, batch, classes]"


def prefix_mean(logits: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Mean of the logits of the first n members, for every n in ``sizes`` (eq. 1 and 5).

    Args:
        logits: ``[N, B, L]``, floating point.
        sizes: strictly rising ensemble sizes from 1 to N; None for the powers of two below N, then N.

    Returns:
        ``[P, B, L]``, one ensemble per size, dtype of ``logits``. Differentiable any number of times.

    Raises:
        ValueError: wrong rank, no model, or sizes that do not rise from 1 to N.
        TypeError: ``logits`` is not floating point.
    """
    checks.rank("logits", logits, 3, LAYOUT)
    checks.same_kind("logits", logits)
    sizes = checks.prefix_sizes(sizes, logits.shape[0])
    return dispatch.implementation("prefix_mean", logits)(logits, sizes)


@torch.library.register_fake("hne::prefix_mean")
def _(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    return logits.new_empty(len(sizes), *logits.shape[1:])


@torch.library.register_fake("hne::prefix_mean_backward")
def _(grad: Tensor, sizes: Sequence[int], num_models: int) -> Tensor:
    return grad.new_empty(num_models, *grad.shape[1:])


def differentiate(op: str) -> None:
    """Register autograd of ``op`` and ``op_backward``, which are linear and each other's adjoint."""
    forward, backward = getattr(torch.ops.hne, op), getattr(torch.ops.hne, f"{op}_backward")

    def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.sizes = inputs
        ctx.num_models = logits.shape[0]

    def differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return backward(grad, ctx.sizes, ctx.num_models), None

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.sizes, _ = inputs

    def differentiate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return forward(grad, ctx.sizes), None, None

    autograd.register(op, differentiate_forward, setup_forward)
    autograd.register(f"{op}_backward", differentiate_backward, setup_backward)


differentiate("prefix_mean")
