"""Branch-replicating grouped convolution."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from . import convolution

convolution.register("branch_conv2d", depthwise=False)


def branch_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
) -> Tensor:
    """Convolve every branch with its own filters; with ``replicate`` r, output branch g reads branch ``g // r``.

    The replication of a branching layer (Tables 2 and 3) is an index, never a copy. A leading slice of ``weight``
    evaluates a smaller ensemble.

    Args:
        x: features ``[G, B, H, W, C_in]``; float32, float64 or bfloat16 on the CPU.
        weight: filters ``[G', C_out, C_in, k, k]``, dtype of ``x``.
        bias: ``[G', C_out]`` or None.
        stride: step in pixels, in both directions.
        padding: zeros around each feature map, in pixels.
        replicate: r, the children per branch of ``x``: ``G' = G * r``, or less where the last branch has fewer
            children (a leading slice of the tree).

    Returns:
        ``[G', B, H', W', C_out]`` with ``H' = (H + 2 * padding - k) // stride + 1``. Differentiable
        any number of times.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    checks.convolution(x, weight, bias, stride, padding, replicate, depthwise=False)
    op = dispatch.implementation("branch_conv2d", x)
    return op(x, weight, bias, stride, padding, replicate)
