"""Convolution of all branches as one grouped matrix product.

Rows are the output pixels of a branch, columns its output channels. The sum runs over the taps of the window and the
input channels (an implicit matrix product: windows are never stored). A fixed number of programs share the tiles of all
branches. Tiles of the children of one parent are adjacent, so that its features are read once and then come from the
L2 cache. The gradient of the input is the same product with flipped windows, summed over the children of a branch. The
gradient of the weight sums over pixels, in as many parts as fill the GPU, each with its own memory: without atomic
operations, the result is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..ops import convolution
from .batch_statistics import deviations, write_partial, write_partials
from .conv_norm import PLAIN, ConvNorm
from .device import (
    activate,
    denormalize,
    denormalize_sum,
    dot,
    multiple_of,
    norm_of,
    normalize,
    per_channel,
    split_row,
    total_gradient,
    window,
)
from .launch import SIZES, Kernel, check_pixels, common_multiple, config, contiguous, op, split

_PANEL = tl.constexpr(checks.PANEL)


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    source, weight, bias, residual, out,
    output, output_mean, grad_mean, grad_var, input, norm, first_part, second_part,
    stored, grad_added, added, added_norm, added_part,
    parents, branches, replicate, residual_replicate,
    batch, height, width, out_height, out_width, in_channels, out_channels,
    weight_branch, weight_panel, weight_out, weight_in, weight_y, weight_x,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    MULTIPLE: tl.constexpr, WEIGHT_OUT: tl.constexpr, WEIGHT_IN: tl.constexpr,
    ACTIVATION: tl.constexpr, NORMAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = activation(convolution of source + bias + residual)``; transposed, a sum over the children.

    For :mod:`.branch_norm_conv2d`, forward: with ``norm``, the source is normalised where it is read, with the
    activation NORMAL, and the partials are statistics of ``out``. Transposed: with ``output``, the source is the
    gradient of ``output``, and the gradients of its statistics are added where it is read; with ``norm``, ``out`` is
    the gradient of ``input`` before the normalisation, and the partials are the gradients of shift and scale. With
    ``stored``, the normalised ``input`` with something added, ``residual`` is the gradient of its other readers;
    ``grad_added`` is the gradient of what was added, ``added``, if ``added_norm`` normalised it.
    """
    in_channels, out_channels = multiple_of(in_channels, MULTIPLE), multiple_of(out_channels, MULTIPLE)
    weight_out, weight_in = multiple_of(weight_out, WEIGHT_OUT), multiple_of(weight_in, WEIGHT_IN)
    rows = batch * out_height * out_width
    values = (tl.cast(batch, tl.float32) * height) * width
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_channels, BLOCK_N)
    columns = tiles_n if TRANSPOSED else replicate * tiles_n
    chunks = tl.cdiv(in_channels, BLOCK_K)
    for tile in range(tl.program_id(0), parents * tiles_m * columns, tl.num_programs(0)):
        parent, column = tile // columns // tiles_m, tile % columns
        first = parent * replicate + (0 if TRANSPOSED else column // tiles_n)
        members = tl.minimum(replicate if TRANSPOSED else 1, branches - first)
        branch = parent if TRANSPOSED else first
        if members > 0:  # the last parent may have fewer children
            tile_m = tile // columns % tiles_m
            row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (column % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            image, y, x = split_row(row, out_height, out_width)
            weight_column = n // _PANEL * weight_panel + n % _PANEL * weight_out
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(members * KERNEL * KERNEL * chunks):
                tap = step // chunks % (KERNEL * KERNEL)
                member = first + step // chunks // (KERNEL * KERNEL)
                tap_y, tap_x = tap // KERNEL, tap % KERNEL
                from_y, from_x, inside = window(y, x, tap_y, tap_x, height, width, STRIDE, PADDING, TRANSPOSED)
                reads = member if TRANSPOSED else parent
                pixel = ((reads.to(tl.int64) * batch + image) * height + from_y) * width + from_x
                k = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
                at = pixel[:, None] * in_channels + k[None, :]
                here = (inside & (row < rows))[:, None] & (k < in_channels)[None, :]
                a = tl.load(source + at, mask=here, other=0.0)
                if output is not None:
                    a = total_gradient(
                        a,
                        tl.load(output + at, mask=here, other=0.0),
                        per_channel(output_mean, reads, k, in_channels),
                        per_channel(grad_mean, reads, k, in_channels),
                        per_channel(grad_var, reads, k, in_channels),
                        values,
                    )
                    a = tl.where(here, a, 0.0).to(source.dtype.element_ty)
                if norm is not None and not TRANSPOSED:
                    mean, scale, shift = norm_of(norm, reads, parents, k, in_channels)
                    a = normalize(a, mean, scale, shift)
                    a = tl.where(here, activate(a, NORMAL), 0.0).to(source.dtype.element_ty)
                filters = weight + member.to(tl.int64) * weight_branch
                filters += tap_y.to(tl.int64) * weight_y + tap_x.to(tl.int64) * weight_x
                b = tl.load(
                    filters + k[:, None] * weight_in + weight_column[None, :],
                    mask=(k < in_channels)[:, None] & (n < out_channels)[None, :],
                    other=0.0,
                )
                sums = dot(a, b, sums, PRECISION)
            if bias is not None:
                sums += per_channel(bias, branch, n, out_channels)
            mask = (row < rows)[:, None] & (n < out_channels)[None, :]
            within = row.to(tl.int64)[:, None] * out_channels + n[None, :]
            if residual is not None:
                shared = (branch // residual_replicate).to(tl.int64) * rows * out_channels
                sums += tl.load(residual + shared + within, mask=mask, other=0.0).to(tl.float32)
            sums = activate(sums, ACTIVATION)
            at = branch.to(tl.int64) * rows * out_channels + within
            if norm is not None and TRANSPOSED:
                mean, scale, shift = norm_of(norm, branch, parents, n, out_channels)
                original = tl.load(input + at, mask=mask, other=0.0)
                if stored is not None:
                    result = tl.load(stored + at, mask=mask, other=0.0)
                    sums, by_shift, by_scale = denormalize_sum(sums, original, result, mean, scale, NORMAL)
                else:
                    sums, by_shift, by_scale = denormalize(sums, original, mean, scale, shift, NORMAL)
                write_partials(
                    first_part, second_part, tl.sum(by_shift, 0), tl.sum(by_scale, 0),
                    tile_m, rows, branch, parents, n, out_channels, False, BLOCK_M,
                )  # fmt: skip
                if grad_added is not None:
                    of_added = by_shift
                    if added_norm is not None:
                        mean, scale, shift = norm_of(added_norm, branch, parents, n, out_channels)
                        values_added = tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
                        write_partial(
                            added_part, tl.sum(by_shift * (values_added - mean), 0),
                            tile_m, rows, branch, parents, n, out_channels, False, BLOCK_M,
                        )  # fmt: skip
                        of_added = by_shift * scale
                    tl.store(grad_added + at, of_added.to(grad_added.dtype.element_ty), mask=mask)
            written = sums.to(out.dtype.element_ty)
            tl.store(out + at, written, mask=mask)
            if first_part is not None and not TRANSPOSED:
                average, square = deviations(written.to(tl.float32), tile_m * BLOCK_M, rows, BLOCK_M)
                write_partials(
                    first_part, second_part, average, square,
                    tile_m, rows, branch, branches, n, out_channels, True, BLOCK_M,
                )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _weight_kernel(
    grad, source, partial, output, output_mean, grad_mean, grad_var, norm,
    branches, replicate, batch, height, width, out_height, out_width, in_channels, out_channels, parts,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    MULTIPLE: tl.constexpr, NORMAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partial[part, branch, out, in, tap]``: the gradient of the weight for one part of the pixels.

    With ``output``, the gradients of its statistics are added to ``grad``, and with ``norm``, the source is
    normalised, both where they are read.
    """
    in_channels, out_channels = multiple_of(in_channels, MULTIPLE), multiple_of(out_channels, MULTIPLE)
    rows = batch * out_height * out_width
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_K) * BLOCK_K
    tiles_m, tiles_n = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(in_channels, BLOCK_N)
    taps: tl.constexpr = KERNEL * KERNEL
    for tile in range(tl.program_id(0), parts * branches * tiles_m * tiles_n * taps, tl.num_programs(0)):
        tap = tile % taps  # adjacent, as taps read nearly the same pixels
        m = tile // taps % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        n = tile // taps // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        number = tile // taps // tiles_m // tiles_n % branches  # divisions are slow in 64 bits
        branch, parent = number.to(tl.int64), (number // replicate).to(tl.int64)
        part = (tile // taps // tiles_m // tiles_n // branches).to(tl.int64)
        start = tl.minimum(part * length, rows).to(tl.int32)
        end = tl.minimum(start + tl.cast(length, tl.int64), rows).to(tl.int32)
        if output is not None:
            above_mean = per_channel(output_mean, branch, m, out_channels)
            above_grad_mean = per_channel(grad_mean, branch, m, out_channels)
            above_grad_var = per_channel(grad_var, branch, m, out_channels)
        if norm is not None:
            mean, scale, shift = norm_of(norm, parent, tl.cdiv(branches, replicate), n, in_channels)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(end - start, BLOCK_K)):
            row = start + step * BLOCK_K + tl.arange(0, BLOCK_K)
            image, y, x = split_row(row, out_height, out_width)
            y, x, inside = window(y, x, tap // KERNEL, tap % KERNEL, height, width, STRIDE, PADDING, False)
            at = (branch * rows + row)[:, None] * out_channels + m[None, :]
            here = (row < end)[:, None] & (m < out_channels)[None, :]
            a = tl.load(grad + at, mask=here, other=0.0)
            if output is not None:
                written = tl.load(output + at, mask=here, other=0.0)
                a = total_gradient(a, written, above_mean, above_grad_mean, above_grad_var, tl.cast(rows, tl.float32))
                a = tl.where(here, a, 0.0).to(grad.dtype.element_ty)
            pixel = ((parent * batch + image) * height + y) * width + x
            here = (inside & (row < end))[:, None] & (n < in_channels)[None, :]
            b = tl.load(source + pixel[:, None] * in_channels + n[None, :], mask=here, other=0.0)
            if norm is not None:
                b = activate(normalize(b, mean, scale, shift), NORMAL)
                b = tl.where(here, b, 0.0).to(source.dtype.element_ty)
            sums = dot(tl.trans(a), b, sums, PRECISION)
        plane = (part * branches + branch) * out_channels
        entry = ((plane + m)[:, None] * in_channels + n[None, :]) * taps + tap
        tl.store(partial + entry, sums, mask=(m < out_channels)[:, None] & (n < in_channels)[None, :])


# Tall tiles, as layers have 16 to 256 channels per branch and thousands of pixels. Three stages hide the latency of the
# memory. Smaller tiles where threads need more registers: float32 without tensor cores holds its operands in them, and
# channel counts that 8 does not divide (an image has 3) are read one by one.
_KEY = ["height", "in_channels", "out_channels", "KERNEL", "STRIDE", "NORMAL"]
_TILES = [
    config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    config(8, 3, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
]
_convolve = Kernel(_kernel, _TILES, [*_KEY, "TRANSPOSED"])
_convolve_tf32 = Kernel(_kernel, _TILES[:1], [])  # with twice the bytes, the other tile would spill
_convolve_small = Kernel(_kernel, [config(4, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16)], [])
# A channel count of 1 is a constant to the compiler, and the tile above would spill.
_convolve_single = Kernel(_kernel, [config(2, BLOCK_M=64, BLOCK_N=16, BLOCK_K=16)], [])
_weigh = Kernel(_weight_kernel, [_TILES[0], config(8, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)], _KEY)
_weigh_small = Kernel(_weight_kernel, [config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16)], [])


def dot_precision(tensor: Tensor) -> str:
    """Precision of float32 products: tf32, for the tensor cores, only where torch allows it."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets it, too
    return "tf32" if tensor.dtype == torch.float32 and allowed else "ieee"


def _is_small(precision: str, multiple: int, tensor: Tensor) -> bool:
    return multiple == 1 or (tensor.dtype == torch.float32 and precision == "ieee")


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    replicate: int,
    *,
    packed: bool = False,
    activation: str = "none",
    residual: Tensor | None = None,
    residual_replicate: int = 1,
) -> Tensor:
    """``activation(convolution + bias + residual)`` in one kernel.

    Args:
        packed: ``weight`` has the layout of :func:`hne_kernels.pack_weight`, and ``bias`` is given.
        residual: ``[G'', B, H', W', C_out]``; its branch ``g // residual_replicate`` is added to branch g.
    """
    layout: tuple[int, ...]
    if packed and bias is not None:
        s, kernel_size, out_channels = weight.stride(), weight.shape[2], bias.shape[1]
        layout = (s[0], s[1], s[5], s[4], s[2], s[3])
    else:
        layout, kernel_size, out_channels = strides(weight), weight.shape[4], weight.shape[1]
    shape = checks.geometry(x, weight.shape[0], out_channels, kernel_size, stride, padding)
    check_pixels("x", shape)
    out = x.new_empty(shape)
    launch(
        x, weight, layout, out, x.shape[0], weight.shape[0], replicate, kernel_size, stride, padding,
        bias=bias, residual=residual, residual_replicate=residual_replicate, activation=activation,
    )  # fmt: skip
    return out


def launch(
    source: Tensor, weight: Tensor, layout: Sequence[int], out: Tensor, parents: int, branches: int, replicate: int,
    kernel_size: int, stride: int, padding: int, *, transposed: bool = False,
    bias: Tensor | None = None, residual: Tensor | None = None, residual_replicate: int = 1,
    activation: str = "none", conv_norm: ConvNorm = PLAIN,
) -> None:  # fmt: skip
    """Write the convolution of ``source``, transposed or not, to ``out``."""
    precision, multiple = dot_precision(source), common_multiple(source.shape[4], out.shape[4])
    kernel = _convolve_tf32 if precision == "tf32" else _convolve
    if _is_small(precision, multiple, source):
        kernel = _convolve_single if 1 in (source.shape[4], out.shape[4]) else _convolve_small
    kernel(
        source.contiguous(), weight, contiguous(bias), contiguous(residual), out,
        *conv_norm.output, conv_norm.input, conv_norm.norm, *conv_norm.partials,
        conv_norm.stored, conv_norm.grad_residual, conv_norm.residual, conv_norm.residual_norm,
        conv_norm.residual_partial,
        parents, branches, replicate, residual_replicate, *source.shape[1:4], *out.shape[2:4],
        source.shape[4], out.shape[4], *layout,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding, TRANSPOSED=transposed,
        MULTIPLE=multiple,
        WEIGHT_OUT=common_multiple(multiple, layout[2]), WEIGHT_IN=common_multiple(multiple, layout[3]),
        ACTIVATION=activation, NORMAL=conv_norm.activation, PRECISION=precision,
    )  # fmt: skip


def strides(weight: Tensor, *, transposed: bool = False) -> tuple[int, ...]:
    """Strides of ``weight`` [branch, out, in, y, x] for :func:`launch`; transposed, out and in are swapped."""
    branch, out, into, *window = weight.stride()
    if transposed:
        out, into = into, out
    return branch, checks.PANEL * out, out, into, *window


def weigh(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int,
    conv_norm: ConvNorm = PLAIN,
) -> Tensor:  # fmt: skip
    """The gradient of the weight from that of the output."""
    check_pixels("grad", grad.shape)
    shape = (grad.shape[0], grad.shape[4], x.shape[4], kernel_size, kernel_size)
    parts = split(shape[0] * -(-shape[1] // 64) * -(-shape[2] // 64) * kernel_size**2, x.device)
    partial = x.new_empty((parts, *shape), dtype=torch.float32)
    precision, multiple = dot_precision(x), common_multiple(x.shape[4], grad.shape[4])
    kernel = _weigh_small if _is_small(precision, multiple, x) else _weigh
    kernel(
        grad.contiguous(), x.contiguous(), partial, *conv_norm.output, conv_norm.norm,
        grad.shape[0], replicate, *x.shape[1:4], *grad.shape[2:4], x.shape[4], grad.shape[4], parts,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
        MULTIPLE=multiple, NORMAL=conv_norm.activation, PRECISION=precision,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


@op
def branch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int) -> Tensor:
    """See :func:`hne_kernels.branch_conv2d`."""
    checks.convolution(x, weight, bias, stride, padding, replicate, depthwise=False)
    return convolve(x, weight, bias, stride, padding, replicate)


@op
def branch_conv2d_backward_input(
    grad: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the input of :func:`branch_conv2d`."""
    branches, out_channels, in_channels, _, kernel_size = weight.shape
    checks.same_kind("grad", grad, weight=weight)
    checks.convolution_gradient(grad, branches, out_channels, height, width, kernel_size, stride, padding, replicate)
    parents = -(-branches // replicate)
    shape = (parents, grad.shape[1], height, width, in_channels)
    check_pixels("x", shape)
    out = grad.new_empty(shape)
    launch(
        grad, weight, strides(weight, transposed=True), out, parents, branches, replicate, kernel_size, stride, padding,
        transposed=True,
    )  # fmt: skip
    return out


@op
def branch_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the weight of :func:`branch_conv2d`."""
    checks.same_kind("x", x, grad=grad)
    checks.check_branches(x, grad, replicate)
    checks.convolution_gradient(
        grad, grad.shape[0], grad.shape[4], x.shape[2], x.shape[3], kernel_size, stride, padding, replicate
    )
    return weigh(grad, x, kernel_size, stride, padding, replicate)


convolution.differentiate("triton_branch_conv2d")
