"""Linear heads of all leaves, and the logits of the nested ensembles, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch


def prefix_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, sizes: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of a linear head per leaf, and the mean logits of the first n leaves for every n in ``sizes`` (eq. 5).

    Args:
        features: ``[N, B, C]``, the pooled features of the leaves.
        weight: ``[N, L, C]``, dtype of ``features``.
        bias: ``[N, L]`` or None.
        sizes: strictly rising ensemble sizes from 1 to N; None for the powers of two below N, then N.

    Returns:
        ``(member, prefix)``: ``[N, B, L]`` and ``[P, B, L]``. Differentiable any number of times.

    Raises:
        ValueError: a shape, a device or the sizes do not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    _check(features, weight, bias)
    sizes = checks.prefix_sizes(sizes, features.shape[0])
    return dispatch.implementation("prefix_logits", features)(features, weight, bias, sizes)


def _check(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.rank("features", features, 3, "[models, batch, channels]")
    checks.rank("weight", weight, 3, "[models, classes, channels]")
    checks.same_kind("features", features, weight=weight, bias=bias)
    models, _, channels = features.shape
    classes = weight.shape[1]
    checks.shape("weight", weight, (models, classes, channels), "[models, classes, channels]")
    if bias is not None:
        checks.shape("bias", bias, (models, classes), "[models, classes]")


@torch.library.register_fake("hne::prefix_logits")
def _(features: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    _check(features, weight, bias)
    batch, classes = features.shape[1], weight.shape[1]
    member = features.new_empty(features.shape[0], batch, classes)
    return member, features.new_empty(len(sizes), batch, classes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, weight, _, ctx.sizes = inputs
    ctx.save_for_backward(features, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_member: Tensor | None, grad_prefix: Tensor | None) -> tuple[Any, ...]:
    features, weight = ctx.saved_tensors
    need_features, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad = grad_member
    if grad_prefix is not None:
        through_prefix = torch.ops.hne.prefix_mean_backward(grad_prefix, ctx.sizes, features.shape[0])
        grad = through_prefix if grad is None else grad + through_prefix
    if grad is None:
        return None, None, None, None
    grad_features = torch.bmm(grad, weight) if need_features else None
    grad_weight = torch.bmm(grad.transpose(1, 2), features) if need_weight else None
    return grad_features, grad_weight, grad.sum(1) if need_bias else None, None


autograd.register("prefix_logits", _backward, _setup_context)
autocast.register("prefix_logits")
