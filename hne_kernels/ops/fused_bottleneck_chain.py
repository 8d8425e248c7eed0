"""Consecutive bottlenecks of stride 1 in one op (inference)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autocast, autograd, checks, dispatch
from .fused_bottleneck import check as check_bottleneck

#: Weights and numbers of a layer.
NUM_WEIGHTS, NUM_NUMBERS = 8, 4
#: Layers, rows, columns and channels that the CUDA kernel takes.
MOST_LAYERS, MOST_SIDE, MOST_CHANNELS = 8, 8, 256

_LIBRARY = torch.library.Library("hne", "IMPL")


def fused_bottleneck_chain(
    x: Tensor, weights: Sequence[Tensor | None], numbers: Sequence[int], *, pool: bool = False
) -> Tensor:
    """Apply bottlenecks of stride 1 one after another, as :func:`fused_bottleneck` does one.

    On a GPU, feature maps of at most 8 x 8 pixels and 256 channels stay in shared memory from layer to layer, if the
    3x3 bottlenecks have equal channels. Other chains and backends compute the layers one by one.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weights: the eight tensors that :func:`fused_bottleneck` takes after ``x``, for each layer in order.
        numbers: for each layer in order: ``replicate``, ``activation``, ``identity`` and ``final_activation`` of
            :func:`fused_bottleneck`; an activation is its index in ``none``, ``relu``, ``relu6``.
        pool: average over the pixels of the last output.

    Returns:
        ``[G', B, H, W, C_out]``; with ``pool`` ``[G', B, 1, 1, C_out]``.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the layer and the argument.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is required; this op is for inference.
    """
    checks.no_gradient("fused_bottleneck_chain", x, *weights)
    op = dispatch.implementation("fused_bottleneck_chain", x, late_check=check)
    result: Tensor = op(x, list(weights), list(numbers), pool)
    return result


def _arguments(weights: Sequence[Tensor | None], numbers: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The arguments of ``fused_bottleneck`` after x, for each layer."""
    for i in range(len(numbers) // NUM_NUMBERS):
        replicate, activation, identity, final_activation = numbers[NUM_NUMBERS * i :][:NUM_NUMBERS]
        names = checks.ACTIVATIONS[activation], checks.ACTIVATIONS[final_activation]
        yield *weights[NUM_WEIGHTS * i :][:NUM_WEIGHTS], 1, replicate, names[0], bool(identity), names[1]


def check(x: Tensor, weights: Sequence[Tensor | None], numbers: Sequence[int], pool: bool) -> tuple[int, ...]:
    """Check the arguments of :func:`fused_bottleneck_chain` and return the shape of the output."""
    if not numbers or len(numbers) % NUM_NUMBERS:
        raise ValueError(f"numbers: expected four for each of one or more layers, got {len(numbers)}")
    count = len(numbers) // NUM_NUMBERS
    if len(weights) != NUM_WEIGHTS * count:
        raise ValueError(f"weights: expected eight for each of {count} layers, got {len(weights)}")
    for number in numbers[1::2]:
        if not 0 <= number < len(checks.ACTIVATIONS):
            raise ValueError(f"numbers: expected the index of an activation from 0 to 2, got {number}")
    shape: tuple[int, ...] = ()
    for index, arguments in enumerate(_arguments(weights, numbers)):
        try:
            shape = check_bottleneck(x, *arguments)
        except (ValueError, TypeError) as error:
            raise type(error)(f"layer {index}: {error}") from None
        x = x.new_empty(()).expand(shape)  # a tensor without memory, like the output
    return (*shape[:2], 1, 1, shape[4]) if pool else shape


def _compose(x: Tensor, weights: Sequence[Tensor | None], numbers: Sequence[int], pool: bool) -> Tensor:
    check(x, weights, numbers, pool)
    for arguments in _arguments(weights, numbers):
        x = dispatch.implementation("fused_bottleneck", x)(x, *arguments)
    return x.mean((2, 3), keepdim=True) if pool else x


@torch.library.register_fake("hne::fused_bottleneck_chain")
def _(x: Tensor, weights: Sequence[Tensor | None], numbers: Sequence[int], pool: bool) -> Tensor:
    return x.new_empty(check(x, weights, numbers, pool))


# Devices for which the library has no kernel. An exported program may be called on any.
_LIBRARY.impl("fused_bottleneck_chain", _compose, "CompositeExplicitAutograd")
dispatch.register("fused_bottleneck_chain", _compose, "triton")
autocast.register("fused_bottleneck_chain")
autograd.register_inference("fused_bottleneck_chain")
