"""Branch convolution of a map that is normalised as it is read, with the batch statistics of what is written."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from . import stats_convolution

stats_convolution.register("branch_conv2d_stats", depthwise=False)


def branch_conv2d_stats(
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
    """``y = conv(activation((x - mean) * scale + shift))``, and mean and variance of ``y``.

    Batch norm (Ioffe & Szegedy 2015) between two convolutions without a map of its own: the first one gives the
    statistics, ``scale = weight / sqrt(var + eps)`` and ``shift = bias`` are made of them, and the second one
    normalises what it reads. The padding is zero after the activation.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G', C_out, C_in, k, k]``, dtype of ``x``.
        mean, scale, shift: ``[G, C_in]``, float32 (float64 for a float64 ``x``); all three, or none for an ``x`` that
            is read as it is.
        activation: ``none``, ``relu`` or ``relu6`` of the normalised ``x``.
        stride, padding, replicate: as in :func:`branch_conv2d`.

    Returns:
        ``(y, mean, var)``: y ``[G', B, H', W', C_out]``; its mean and biased variance over batch, height and width
        ``[G', C_out]`` in the dtype of the statistics, 0 for an empty batch. All three are differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    arguments = (x, weight, mean, scale, shift, activation, stride, padding, replicate)
    stats_convolution.check(*arguments, depthwise=False)
    y, y_mean, y_var = dispatch.implementation("branch_conv2d_stats", x)(*arguments)
    return y, y_mean, y_var
