"""The bottlenecks of a chain, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..checks import ACTIVATIONS
from .fused_bottleneck import fused_bottleneck


def fused_bottleneck_chain(x: Tensor, weights: Sequence[Tensor | None], numbers: Sequence[int], pool: bool) -> Tensor:
    """See :func:`hne_kernels.fused_bottleneck_chain`."""
    for i in range(len(numbers) // 4):
        replicate, activation, identity, final_activation = numbers[4 * i : 4 * i + 4]
        names = ACTIVATIONS[activation], ACTIVATIONS[final_activation]
        arguments: list[Any] = [*weights[8 * i : 8 * i + 8], 1, replicate, names[0], bool(identity), names[1]]
        x = fused_bottleneck(x, *arguments)
    return x.mean((2, 3), keepdim=True) if pool else x
