"""Depthwise branch convolution of a map that is normalised as it is read, with the statistics of what is written."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from . import stats_convolution

stats_convolution.register("branch_depthwise_conv2d_stats", depthwise=True)


def branch_depthwise_conv2d_stats(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: str = "none",
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`branch_conv2d_stats` with a filter for every channel by itself.

    Args:
        x: features ``[G, B, H, W, C]``.
        weight: filters ``[G', C, k, k]``, dtype of ``x``.
        mean, scale, shift, activation, stride, padding, replicate: as in :func:`branch_conv2d_stats`.

    Returns:
        ``(y, mean, var)``: y ``[G', B, H', W', C]``, its mean and biased variance ``[G', C]``.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, mean, scale, shift, activation, stride, padding, replicate)
    stats_convolution.check(*arguments, depthwise=True)
    y, y_mean, y_var = dispatch.implementation("branch_depthwise_conv2d_stats", x)(*arguments)
    return y, y_mean, y_var
