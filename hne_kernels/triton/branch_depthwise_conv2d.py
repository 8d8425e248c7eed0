"""Depthwise convolution of all branches: a weighted sum over the taps of each pixel's window.

Without a matrix product, memory bounds the speed: a value needs 2 k^2 FLOPs, and each feature map is read and written
once. A tile has consecutive pixels and channels (accesses of 16 bytes), and adjacent windows overlap in the cache. A
program adds one tap after another, so that it needs few registers and many programs wait for memory at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..ops import convolution
from .batch_statistics import GROUP, deviations, write_partials
from .conv_norm import PLAIN, ConvNorm
from .device import (
    activate,
    denormalize,
    multiple_of,
    norm_of,
    normalize,
    per_channel,
    split_row,
    total_gradient,
    window,
)
from .launch import SIZES, Kernel, check_pixels, common_multiple, config, contiguous, op, split


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    source, weight, bias, out,
    output, output_mean, grad_mean, grad_var, input, norm, first_part, second_part,
    parents, branches, replicate, batch, height, width, out_height, out_width, channels,
    weight_branch, weight_channel, weight_y, weight_x,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    MULTIPLE: tl.constexpr, ACTIVATION: tl.constexpr, NORMAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = activation(convolution of source + bias)``; transposed, a sum over the children of a branch.

    Other operands are as in :mod:`.branch_conv2d`.
    """
    channels = multiple_of(channels, MULTIPLE)
    rows = batch * out_height * out_width
    values = (tl.cast(batch, tl.float32) * height) * width
    tiles_m, tiles_c = tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    outputs = parents if TRANSPOSED else branches
    for tile in range(tl.program_id(0), outputs * tiles_m * tiles_c, tl.num_programs(0)):
        number = tile // tiles_c // tiles_m  # divisions are slow in 64 bits
        branch, parent = number.to(tl.int64), (number // replicate).to(tl.int64)
        tile_m = tile // tiles_c % tiles_m
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
        image, y, x = split_row(row, out_height, out_width)
        first = branch * replicate if TRANSPOSED else branch
        members = tl.minimum(replicate if TRANSPOSED else 1, branches - first).to(tl.int32)
        if norm is not None:
            mean, scale, shift = norm_of(norm, branch if TRANSPOSED else parent, parents, c, channels)
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for member in range(members):
            reads = first + member if TRANSPOSED else parent
            filters = weight + (first + member) * weight_branch + c * weight_channel
            if output is not None:
                above_mean = per_channel(output_mean, reads, c, channels)
                above_grad_mean = per_channel(grad_mean, reads, c, channels)
                above_grad_var = per_channel(grad_var, reads, c, channels)
            for tap in range(KERNEL * KERNEL):
                tap_y, tap_x = tap // KERNEL, tap % KERNEL
                from_y, from_x, inside = window(y, x, tap_y, tap_x, height, width, STRIDE, PADDING, TRANSPOSED)
                pixel = ((reads * batch + image) * height + from_y) * width + from_x
                at = pixel[:, None] * channels + c[None, :]
                here = (inside & (row < rows))[:, None] & (c < channels)[None, :]
                value = tl.load(source + at, mask=here, other=0.0).to(tl.float32)
                if output is not None:
                    written = tl.load(output + at, mask=here, other=0.0)
                    value = total_gradient(value, written, above_mean, above_grad_mean, above_grad_var, values)
                    value = tl.where(here, value, 0.0)
                if norm is not None and not TRANSPOSED:
                    value = tl.where(here, activate(normalize(value, mean, scale, shift), NORMAL), 0.0)
                taps = filters + tl.cast(tap_y, tl.int64) * weight_y + tl.cast(tap_x, tl.int64) * weight_x
                sums += value * tl.load(taps, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            sums += per_channel(bias, branch, c, channels)
        sums = activate(sums, ACTIVATION)
        at = (branch * rows + row)[:, None] * channels + c[None, :]
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        if norm is not None and TRANSPOSED:
            original = tl.load(input + at, mask=mask, other=0.0)
            sums, by_shift, by_scale = denormalize(sums, original, mean, scale, shift, NORMAL)
            write_partials(
                first_part, second_part, tl.sum(by_shift, 0), tl.sum(by_scale, 0),
                tile_m, rows, branch, parents, c, channels, False, BLOCK_M,
            )  # fmt: skip
        written = sums.to(out.dtype.element_ty)
        tl.store(out + at, written, mask=mask)
        if first_part is not None and not TRANSPOSED:
            average, square = deviations(written.to(tl.float32), tile_m * BLOCK_M, rows, BLOCK_M)
            write_partials(
                first_part, second_part, average, square,
                tile_m, rows, branch, branches, c, channels, True, BLOCK_M,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _weight_kernel(
    grad, source, partial, output, output_mean, grad_mean, grad_var, norm,
    branches, replicate, batch, height, width, out_height, out_width, channels, parts,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    MULTIPLE: tl.constexpr, NORMAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``partial[part, branch, channel, tap]``: the gradient of the weight for one part of the pixels.

    Other operands are as in :mod:`.branch_conv2d`.
    """
    channels = multiple_of(channels, MULTIPLE)
    rows = batch * out_height * out_width
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_M) * BLOCK_M
    tiles_c = tl.cdiv(channels, BLOCK_C)
    taps: tl.constexpr = KERNEL * KERNEL
    for tile in range(tl.program_id(0), parts * branches * tiles_c * taps, tl.num_programs(0)):
        tap = tile % taps  # adjacent, as taps read nearly the same pixels, from the L2 cache
        c = tile // taps % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        number = tile // taps // tiles_c % branches
        branch, parent = number.to(tl.int64), (number // replicate).to(tl.int64)
        part = (tile // taps // tiles_c // branches).to(tl.int64)
        start = tl.minimum(part * length, rows).to(tl.int32)
        end = tl.minimum(start + tl.cast(length, tl.int64), rows).to(tl.int32)
        if output is not None:
            above_mean = per_channel(output_mean, branch, c, channels)
            above_grad_mean = per_channel(grad_mean, branch, c, channels)
            above_grad_var = per_channel(grad_var, branch, c, channels)
        if norm is not None:
            mean, scale, shift = norm_of(norm, parent, tl.cdiv(branches, replicate), c, channels)
        sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(end - start, BLOCK_M)):
            row = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
            image, y, x = split_row(row, out_height, out_width)
            y, x, inside = window(y, x, tap // KERNEL, tap % KERNEL, height, width, STRIDE, PADDING, False)
            mask = (inside & (row < end))[:, None] & (c < channels)[None, :]
            at = (branch * rows + row)[:, None] * channels + c[None, :]
            above = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            if output is not None:
                written = tl.load(output + at, mask=mask, other=0.0)
                above = total_gradient(
                    above, written, above_mean, above_grad_mean, above_grad_var, tl.cast(rows, tl.float32)
                )
            pixel = ((parent * batch + image) * height + y) * width + x
            value = tl.load(source + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if norm is not None:
                value = activate(normalize(value, mean, scale, shift), NORMAL)
            sums += tl.where(mask, above * value, 0.0)
        entry = ((part * branches + branch) * channels + c) * taps + tap
        tl.store(partial + entry, tl.sum(sums, 0), mask=c < channels)


# A bottleneck has 16 to 64 channels, an inverted residual up to 432. A thread has one access of 16 bytes, which is half
# the values in float32: with all of them it would spill.
_KEY = ["height", "channels", "KERNEL", "STRIDE", "NORMAL"]
_TILES = [config(4, BLOCK_M=32, BLOCK_C=32), config(4, BLOCK_M=16, BLOCK_C=64)]
_TILES_FLOAT32 = [config(4, BLOCK_M=16, BLOCK_C=32), config(4, BLOCK_M=8, BLOCK_C=64)]
_TALL = [config(8, BLOCK_M=GROUP, BLOCK_C=32), config(4, BLOCK_M=GROUP, BLOCK_C=16)]  # for statistics
_convolve = Kernel(_kernel, _TILES, [*_KEY, "TRANSPOSED"])
_convolve_float32 = Kernel(_kernel, _TILES_FLOAT32, [*_KEY, "TRANSPOSED"])
_convolve_tall = Kernel(_kernel, _TALL, [*_KEY, "TRANSPOSED"])
_weigh = Kernel(_weight_kernel, _TILES, _KEY)
_TILE_CHANNELS = 32  # of a typical tile, for the number of parts


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
    shape = checks.geometry(x, branches, channels, kernel_size, stride, padding)
    check_pixels("x", shape)
    out = x.new_empty(shape)
    launch(x, weight, out, x.shape[0], replicate, stride, padding, bias=bias, activation=activation)
    return out


def launch(
    source: Tensor, weight: Tensor, out: Tensor, parents: int, replicate: int, stride: int, padding: int, *,
    transposed: bool = False, bias: Tensor | None = None, activation: str = "none", conv_norm: ConvNorm = PLAIN,
) -> None:  # fmt: skip
    """Write the convolution of ``source``, transposed or not, to ``out``."""
    kernel = _convolve_float32 if source.dtype == torch.float32 else _convolve
    if conv_norm.partials[0] is not None:
        kernel = _convolve_tall
    kernel(
        source.contiguous(), weight, contiguous(bias), out,
        *conv_norm.output, conv_norm.input, conv_norm.norm, *conv_norm.partials,
        parents, weight.shape[0], replicate, *source.shape[1:4], *out.shape[2:5], *weight.stride(),
        KERNEL=weight.shape[3], STRIDE=stride, PADDING=padding, TRANSPOSED=transposed,
        MULTIPLE=common_multiple(weight.shape[1]), ACTIVATION=activation, NORMAL=conv_norm.activation,
    )  # fmt: skip


def weigh(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int, conv_norm: ConvNorm = PLAIN
) -> Tensor:
    """The gradient of the weight from that of the output."""
    check_pixels("grad", grad.shape)
    branches, channels = grad.shape[0], x.shape[4]
    parts = split(branches * -(-channels // _TILE_CHANNELS) * kernel_size**2, x.device)
    partial = x.new_empty((parts, branches, channels, kernel_size, kernel_size), dtype=torch.float32)
    _weigh(
        grad.contiguous(), x.contiguous(), partial, *conv_norm.output, conv_norm.norm,
        branches, replicate, *x.shape[1:4], *grad.shape[2:5], parts,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
        MULTIPLE=common_multiple(channels), NORMAL=conv_norm.activation,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


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
    shape = (parents, grad.shape[1], height, width, channels)
    check_pixels("x", shape)
    out = grad.new_empty(shape)
    launch(grad, weight, out, parents, replicate, stride, padding, transposed=True)
    return out


@op
def branch_depthwise_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the weight of :func:`branch_depthwise_conv2d`."""
    branches, channels = grad.shape[0], x.shape[4]
    checks.same_kind("x", x, grad=grad)
    checks.check_branches(x, grad, replicate)
    checks.convolution_gradient(
        grad, branches, channels, x.shape[2], x.shape[3], kernel_size, stride, padding, replicate
    )
    return weigh(grad, x, kernel_size, stride, padding, replicate)


convolution.differentiate("triton_branch_depthwise_conv2d")
