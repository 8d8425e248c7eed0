"""Branch-replicating depthwise convolution."""

from __future__ import annotations

from torch import Tensor

from .. import checks, dispatch
from . import convolution

convolution.register("branch_depthwise_conv2d", depthwise=True)


def branch_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
) -> Tensor:
    """Convolve every channel of every branch with its own filter; output branch g reads branch ``g // replicate``.

    Args:
        x: features ``[G, B, H, W, C]``; float32, float64 or bfloat16 on the CPU.
        weight: filters ``[G', C, k, k]``, dtype of ``x``.
        bias: ``[G', C]`` or None.
        stride: step in pixels, in both directions.
        padding: zeros around each feature map, in pixels.
        replicate: r, the children per branch of ``x``: ``G' = G * r``, or less where the last branch has fewer
            children (a leading slice of the tree).

    Returns:
        ``[G', B, H', W', C]`` with ``H' = (H + 2 * padding - k) // stride + 1``. Differentiable any number
        of times.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    checks.convolution(x, weight, bias, stride, padding, replicate, depthwise=True)
    op = dispatch.implementation("branch_depthwise_conv2d", x)
    return op(x, weight, bias, stride, padding, replicate)
