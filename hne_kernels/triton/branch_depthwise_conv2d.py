"""Depthwise convolution of every branch: a weighted sum over the taps of each pixel's window.

No matrix product, so it is memory that counts: a tile is a run of pixels with a run of channels (16-byte accesses),
neighbouring windows overlap in the cache, and all taps of a tile are asked for at once. Bytes: the map in, the map
out; 2 k^2 FLOPs a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, convolution
from .device import activate, split_row, window
from .launch import SIZES, Kernel, config, op, programs


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    source, weight, bias, out,
    parents, branches, replicate, batch, height, width, out_height, out_width, channels,
    weight_branch, weight_channel, weight_y, weight_x,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = activation(convolution of source + bias)``; transposed, a sum over the children of a branch."""
    rows = tl.cast(batch, tl.int64) * out_height * out_width
    tiles_m, tiles_c = tl.cdiv(rows, BLOCK_M).to(tl.int32), tl.cdiv(channels, BLOCK_C)
    outputs = parents if TRANSPOSED else branches
    for tile in range(tl.program_id(0), outputs * tiles_m * tiles_c, tl.num_programs(0)):
        branch = (tile // tiles_c // tiles_m).to(tl.int64)
        row = (tile // tiles_c % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        image, y, x = split_row(row, out_height, out_width)
        first = branch * replicate if TRANSPOSED else branch
        members = tl.minimum(replicate if TRANSPOSED else 1, branches - first).to(tl.int32)
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for member in range(members):
            read = (first + member if TRANSPOSED else branch // replicate) * batch + image
            filters = weight + (first + member) * weight_branch + c * weight_channel
            for tap in tl.static_range(KERNEL * KERNEL):
                tap_y, tap_x = tap // KERNEL, tap % KERNEL
                from_y, from_x, inside = window(y, x, tap_y, tap_x, height, width, STRIDE, PADDING, TRANSPOSED)
                pixel = (read * height + from_y) * width + from_x
                value = tl.load(
                    source + pixel[:, None] * channels + c[None, :],
                    mask=(inside & (row < rows))[:, None] & (c < channels)[None, :],
                    other=0.0,
                )
                factor = tl.load(filters + tap_y * weight_y + tap_x * weight_x, mask=c < channels, other=0.0)
                sums += value.to(tl.float32) * factor.to(tl.float32)[None, :]
        if bias is not None:
            sums += tl.load(bias + branch * channels + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        sums = activate(sums, ACTIVATION)
        tl.store(
            out + (branch * rows + row)[:, None] * channels + c[None, :],
            sums.to(out.dtype.element_ty),
            mask=(row < rows)[:, None] & (c < channels)[None, :],
        )


@triton.jit(do_not_specialize=SIZES)
def _weight_kernel(
    grad, source, partial,
    branches, replicate, batch, height, width, out_height, out_width, channels, parts,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``partial[part, branch, channel, tap]``: the gradient of the weight from one part of the pixels."""
    rows = tl.cast(batch, tl.int64) * out_height * out_width
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_M) * BLOCK_M
    tiles_c = tl.cdiv(channels, BLOCK_C)
    taps: tl.constexpr = KERNEL * KERNEL
    for tile in range(tl.program_id(0), parts * branches * tiles_c * taps, tl.num_programs(0)):
        tap = tile % taps  # side by side: they read nearly the same pixels, from the L2 cache
        c = tile // taps % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        branch = (tile // taps // tiles_c % branches).to(tl.int64)
        part = (tile // taps // tiles_c // branches).to(tl.int64)
        start = part * length
        end = tl.minimum(start + length, rows)
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(tl.maximum(end - start, 0), BLOCK_M).to(tl.int32)):
            row = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
            image, y, x = split_row(row, out_height, out_width)
            y, x, inside = window(y, x, tap // KERNEL, tap % KERNEL, height, width, STRIDE, PADDING, False)
            inside &= row < end
            mask = inside[:, None] & (c < channels)[None, :]
            pixel = ((branch // replicate * batch + image) * height + y) * width + x
            above = tl.load(grad + (branch * rows + row)[:, None] * channels + c[None, :], mask=mask, other=0.0)
            value = tl.load(source + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0)
            sums += above.to(tl.float32) * value.to(tl.float32)
        entry = ((part * branches + branch) * channels + c) * taps + tap
        tl.store(partial + entry, tl.sum(sums, 0), mask=c < channels)


# Maps have 16 to 64 channels in a bottleneck, up to 432 in an inverted residual.
_KEY = ["height", "channels", "KERNEL", "STRIDE"]
_TILES = [config(4, BLOCK_M=32, BLOCK_C=32), config(4, BLOCK_M=16, BLOCK_C=64)]
_convolve = Kernel(_kernel, _TILES, [*_KEY, "TRANSPOSED"])
_weigh = Kernel(_weight_kernel, _TILES, _KEY)
_PARTIAL_CHANNELS = 32  # channels of a tile, for the number of parts


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    replicate: int,
    *,
    activation: str = "none",
) -> Tensor:
    """``activation(depthwise convolution + bias)`` in one kernel; any strides of ``weight`` [G', C, k, k]."""
    branches, channels, _, kernel_size = weight.shape
    out = x.new_empty(checks.geometry(x, branches, channels, kernel_size, stride, padding))
    return _launch(x, weight, bias, out, x.shape[0], replicate, stride, padding, False, activation)


def _launch(
    source: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor,
    parents: int, replicate: int, stride: int, padding: int, transposed: bool, activation: str,
) -> Tensor:  # fmt: skip
    _convolve(
        source.contiguous(), weight, None if bias is None else bias.contiguous(), out,
        parents, weight.shape[0], replicate, *source.shape[1:4], *out.shape[2:5], *weight.stride(),
        KERNEL=weight.shape[3], STRIDE=stride, PADDING=padding, TRANSPOSED=transposed, ACTIVATION=activation,
    )  # fmt: skip
    return out


@op
def branch_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int
) -> Tensor:
    """See :func:`hne_kernels.branch_depthwise_conv2d`."""
    checks.convolution(x, weight, bias, stride, padding, replicate, depthwise=True)
    return convolve(x, weight, bias, stride, padding, replicate)


@op
def branch_depthwise_conv2d_backward_input(
    grad: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the input of :func:`branch_depthwise_conv2d`."""
    branches, channels, _, kernel_size = weight.shape
    checks.same_kind("grad", grad, weight=weight)
    checks.convolution_gradient(grad, branches, channels, height, width, kernel_size, stride, padding, replicate)
    parents = -(-branches // replicate)
    out = grad.new_empty(parents, grad.shape[1], height, width, channels)
    return _launch(grad, weight, None, out, parents, replicate, stride, padding, True, "none")


@op
def branch_depthwise_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the weight of :func:`branch_depthwise_conv2d`."""
    branches, channels = grad.shape[0], x.shape[4]
    checks.same_kind("x", x, grad=grad)
    checks.family(x, grad, replicate)
    checks.convolution_gradient(
        grad, branches, channels, x.shape[2], x.shape[3], kernel_size, stride, padding, replicate
    )
    tiles = branches * -(-channels // _PARTIAL_CHANNELS) * kernel_size**2
    parts = -(-programs(x.device) // tiles)
    partial = x.new_empty((parts, branches, channels, kernel_size, kernel_size), dtype=torch.float32)
    _weigh(
        grad.contiguous(), x.contiguous(), partial,
        branches, replicate, *x.shape[1:4], *grad.shape[2:5], parts,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


convolution.differentiate("triton_branch_depthwise_conv2d")
