"""A run of bottlenecks or inverted residuals in one op (inference)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autocast, checks, dispatch
from .fused_bottleneck import check as check_one

# What fused_bottleneck takes after x: expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut,
# shortcut_bias.
Weights = Sequence[Tensor | None]


def fused_bottlenecks(
    x: Tensor,
    weights: Sequence[Weights],
    *,
    strides: Sequence[int],
    identities: Sequence[bool],
    replicate: int = 1,
    activation: str = "relu",
    final_activation: str = "none",
) -> Tensor:
    """Bottlenecks one after the other, the maps between them never leaving the cache (on a CPU).

    The same as :func:`fused_bottleneck` called for each of them in turn, the first one with ``replicate``.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weights: for each bottleneck the eight tensors (the last two may be None) that :func:`fused_bottleneck` takes
            after x, of ``G'`` branches each.
        strides, identities: of each bottleneck, as in :func:`fused_bottleneck`.
        replicate: of the first one, as in :func:`branch_conv2d`.
        activation, final_activation: of all of them, as in :func:`fused_bottleneck`.

    Returns:
        ``[G', B, H', W', C_out]`` of the last bottleneck.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the bottleneck and the argument.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for; this op is for inference.
    """
    flat = [tensor for layer in weights for tensor in layer]
    checks.no_gradient("fused_bottlenecks", x, *flat)
    arguments = x, flat, list(strides), replicate, activation, list(identities), final_activation
    if dispatch.select(x) != "cpp":
        check(*arguments)
        for layer in _layers(*arguments[1:]):
            x = dispatch.implementation("fused_bottleneck", x)(x, *layer)
        return x
    return dispatch.call("fused_bottlenecks", check, *arguments)


def check(
    x: Tensor,
    weights: Sequence[Tensor | None],
    strides: Sequence[int],
    replicate: int,
    activation: str,
    identities: Sequence[bool],
    final_activation: str,
) -> tuple[int, ...]:
    """Raise unless all bottlenecks fit; the shape of the result."""
    count = len(strides)
    if count == 0 or len(identities) != count or len(weights) != 8 * count:
        raise ValueError(
            f"weights: expected eight tensors for each of one or more strides, got {len(weights)} tensors, "
            f"{count} strides and {len(identities)} identities"
        )
    layers = _layers(weights, strides, replicate, activation, identities, final_activation)
    for number, layer in enumerate(layers):
        try:
            shape = check_one(x, *layer)
        except (ValueError, TypeError) as error:
            raise type(error)(f"bottleneck {number}: {error}") from None
        x = x.new_empty(()).expand(shape)  # stands for the features that come next
    return shape


def _layers(
    weights: Sequence[Tensor | None],
    strides: Sequence[int],
    replicate: int,
    activation: str,
    identities: Sequence[bool],
    final_activation: str,
) -> Iterator[tuple[Any, ...]]:
    """What fused_bottleneck takes after x, for one bottleneck after the other."""
    for i, (stride, identity) in enumerate(zip(strides, identities, strict=True)):
        first = replicate if i == 0 else 1
        yield *weights[8 * i : 8 * i + 8], stride, first, activation, identity, final_activation


@torch.library.register_fake("hne::fused_bottlenecks")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(check(x, *arguments))


autocast.register("fused_bottlenecks")
