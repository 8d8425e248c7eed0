"""Device functions of the kernels: activations, normalisation, matrix products, windows."""

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
def before_activation(grad, value, ACTIVATION: tl.constexpr):
    """The gradient before an activation, zero where the activation is flat; ``value`` is its input or its output."""
    if ACTIVATION != "none":
        flat = value <= 0
        if ACTIVATION == "relu6":
            flat = flat | (value >= 6)
        grad = tl.where(flat, 0.0, grad)
    return grad


@triton.jit
def multiple_of(number, FACTOR: tl.constexpr):
    """``number``, which FACTOR divides, in a form from which the compiler infers as much.

    ``tl.multiple_of`` has no effect on an argument of a kernel (Triton 3.7), as it marks the operation behind a value.
    """
    return number // FACTOR * FACTOR


@triton.jit
def per_channel(vectors, branch, c, channels):
    """The values of channels ``c`` of a branch, float32, as a row; zero beyond the last channel."""
    return tl.load(vectors + branch * channels + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def norm_of(norm, branch, branches, c, channels):
    """Mean, scale and shift of channels ``c`` of a branch, each as a row; ``norm`` is [3, branches, channels]."""
    return (
        per_channel(norm, branch, c, channels),
        per_channel(norm, branch + branches, c, channels),
        per_channel(norm, branch + 2 * branches, c, channels),
    )


@triton.jit
def normalize(x, mean, scale, shift):
    """``(x - mean) * scale + shift``, in float32."""
    return (x.to(tl.float32) - mean) * scale + shift


@triton.jit
def denormalize(grad, x, mean, scale, shift, ACTIVATION: tl.constexpr):
    """Backward of ``activation(normalize(x))``: the gradient of x, and the terms of those of shift and scale."""
    by_shift = before_activation(grad, normalize(x, mean, scale, shift), ACTIVATION)
    return by_shift * scale, by_shift, by_shift * (x.to(tl.float32) - mean)


@triton.jit
def denormalize_sum(grad, x, y, mean, scale, ACTIVATION: tl.constexpr):
    """Backward of ``y = activation(normalize(x) + residual)``: as :func:`denormalize`; the second is the residual's."""
    by_shift = before_activation(grad, y.to(tl.float32), ACTIVATION)
    return by_shift * scale, by_shift, by_shift * (x.to(tl.float32) - mean)


@triton.jit
def total_gradient(grad, y, mean, grad_mean, grad_var, count):
    """The gradient of a feature map ``y`` with ``count`` values per channel: its own, and through mean and variance."""
    return grad.to(tl.float32) + grad_mean / count + grad_var * (2.0 / count) * (y.to(tl.float32) - mean)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``, summed in float32."""
    if _INTERPRETED:  # numpy has no bfloat16; the products are exact in float32
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def split_row(row, height, width):
    """Image, y and x of the pixel number ``row`` of a batch.

    The division takes 32 bits, as it is slow in 64 (:func:`.launch.check_pixels` ensures that they suffice); the image
    number has 64 bits.
    """
    position = row % (height * width)
    return (row // (height * width)).to(tl.int64), position // width, position % width


@triton.jit
def window(
    y, x, tap_y, tap_x, height, width,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The pixel that a tap of the window at (y, x) reads, and whether it lies inside the feature map.

    Transposed, for the gradient of the input: the output pixel whose window has (y, x) under that tap.
    """
    if TRANSPOSED:
        below, right = y + PADDING - tap_y, x + PADDING - tap_x
        y, x = below // STRIDE, right // STRIDE
        inside = (below >= 0) & (right >= 0) & (below % STRIDE == 0) & (right % STRIDE == 0)
    else:
        y, x = y * STRIDE - PADDING + tap_y, x * STRIDE - PADDING + tap_x
        inside = (y >= 0) & (x >= 0)
    return y, x, inside & (y < height) & (x < width)
