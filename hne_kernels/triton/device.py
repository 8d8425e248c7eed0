"""What kernels have in common on the device: activations, matrix products, the geometry of windows."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``none``, ``relu`` or ``relu6`` of float32 values; NaN stays NaN."""
    if ACTIVATION != "none":
        x = tl.where(x < 0, 0.0, x)
    if ACTIVATION == "relu6":
        x = tl.where(x > 6, 6.0, x)
    return x


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``, summed in float32."""
    if _INTERPRETED:  # numpy has no bfloat16; the products are exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def split_row(row, height, width):
    """Image, y and x of a pixel that is numbered through a batch of maps; the number has 64 bits."""
    position = (row % (height * width)).to(tl.int32)
    return row // (height * width), position // width, position % width


@triton.jit
def window(
    y, x, tap_y, tap_x, height, width,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The pixel that a tap of the window at (y, x) reads, and whether it lies inside the map.

    Transposed (the gradient of the input): the output pixel whose window has (y, x) under that tap.
    """
    if TRANSPOSED:
        below, right = y + PADDING - tap_y, x + PADDING - tap_x
        y, x = below // STRIDE, right // STRIDE
        inside = (below >= 0) & (right >= 0) & (below % STRIDE == 0) & (right % STRIDE == 0)
    else:
        y, x = y * STRIDE - PADDING + tap_y, x * STRIDE - PADDING + tap_x
        inside = (y >= 0) & (x >= 0)
    return y, x, inside & (y < height) & (x < width)
