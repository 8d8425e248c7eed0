"""Convolution of every branch as one grouped matrix product.

Rows are the output pixels of a branch, columns its output channels; the sum runs over the taps of the window and the
input channels (an implicit matrix product: windows are never written down). A fixed number of programs share all
tiles of all branches; children of one parent stand side by side, so that its features are read once and then come
from the L2 cache. The gradient of the input is the same product with the windows turned round, summed over the
children of a branch. The gradient of the weight sums over pixels, in as many parts as fill the GPU, each with its own
memory: no atomic operation, so the same result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, convolution
from .device import activate, dot, split_row, window
from .launch import SIZES, Kernel, config, op, programs

_PANEL = tl.constexpr(checks.PANEL)


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    source, weight, bias, residual, out,
    parents, branches, replicate, residual_replicate,
    batch, height, width, out_height, out_width, in_channels, out_channels,
    weight_branch, weight_panel, weight_out, weight_in, weight_y, weight_x,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
    UNIT: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = activation(convolution of source + bias + residual)``; transposed, a sum over the children."""
    in_channels, out_channels = tl.multiple_of(in_channels, UNIT), tl.multiple_of(out_channels, UNIT)
    rows = tl.cast(batch, tl.int64) * out_height * out_width
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M).to(tl.int32), tl.cdiv(out_channels, BLOCK_N)
    columns = tiles_n if TRANSPOSED else replicate * tiles_n
    chunks = tl.cdiv(in_channels, BLOCK_K)
    for tile in range(tl.program_id(0), parents * tiles_m * columns, tl.num_programs(0)):
        parent, column = tile // columns // tiles_m, tile % columns
        first = parent * replicate + (0 if TRANSPOSED else column // tiles_n)
        members = tl.minimum(replicate if TRANSPOSED else 1, branches - first)
        branch = parent if TRANSPOSED else first
        if members > 0:  # the last parent may have fewer children
            row = (tile // columns % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (column % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            image, y, x = split_row(row, out_height, out_width)
            weight_column = n // _PANEL * weight_panel + n % _PANEL * weight_out
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(members * KERNEL * KERNEL * chunks):
                tap = step // chunks % (KERNEL * KERNEL)
                member = step // chunks // (KERNEL * KERNEL)
                tap_y, tap_x = tap // KERNEL, tap % KERNEL
                from_y, from_x, inside = window(y, x, tap_y, tap_x, height, width, STRIDE, PADDING, TRANSPOSED)
                read = (first + member if TRANSPOSED else parent).to(tl.int64) * batch + image
                pixel = (read * height + from_y) * width + from_x
                k = step % chunks * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
                a = tl.load(
                    source + pixel[:, None] * in_channels + k[None, :],
                    mask=(inside & (row < rows))[:, None] & (k < in_channels)[None, :],
                    other=0.0,
                )
                filters = weight + (first + member).to(tl.int64) * weight_branch + tap_y * weight_y + tap_x * weight_x
                b = tl.load(
                    filters + k[:, None] * weight_in + weight_column[None, :],
                    mask=(k < in_channels)[:, None] & (n < out_channels)[None, :],
                    other=0.0,
                )
                sums = dot(a, b, sums, PRECISION)
            if bias is not None:
                sums += tl.load(bias + branch * out_channels + n, mask=n < out_channels, other=0.0).to(tl.float32)[None]
            mask = (row < rows)[:, None] & (n < out_channels)[None, :]
            within = row[:, None] * out_channels + n[None, :]
            if residual is not None:
                shared = (branch // residual_replicate) * rows * out_channels
                sums += tl.load(residual + shared + within, mask=mask, other=0.0).to(tl.float32)
            sums = activate(sums, ACTIVATION)
            tl.store(out + branch * rows * out_channels + within, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _weight_kernel(
    grad, source, partial,
    branches, replicate, batch, height, width, out_height, out_width, in_channels, out_channels, parts,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``partial[part, branch, out, in, tap]``: the gradient of the weight from one part of the pixels."""
    in_channels, out_channels = tl.multiple_of(in_channels, UNIT), tl.multiple_of(out_channels, UNIT)
    rows = tl.cast(batch, tl.int64) * out_height * out_width
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_K) * BLOCK_K
    tiles_m, tiles_n = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(in_channels, BLOCK_N)
    taps: tl.constexpr = KERNEL * KERNEL
    for tile in range(tl.program_id(0), parts * branches * tiles_m * tiles_n * taps, tl.num_programs(0)):
        tap = tile % taps  # side by side: they read nearly the same pixels
        m = tile // taps % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile // taps // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        branch = tile // taps // tiles_m // tiles_n % branches
        part = tile // taps // tiles_m // tiles_n // branches
        start = part * length
        end = tl.minimum(start + length, rows)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(tl.maximum(end - start, 0), BLOCK_K).to(tl.int32)):
            row = start + step * BLOCK_K + tl.arange(0, BLOCK_K)
            image, y, x = split_row(row, out_height, out_width)
            y, x, inside = window(y, x, tap // KERNEL, tap % KERNEL, height, width, STRIDE, PADDING, False)
            a = tl.load(
                grad + (branch * rows + row)[:, None] * out_channels + m[None, :],
                mask=(row < end)[:, None] & (m < out_channels)[None, :],
                other=0.0,
            )
            pixel = (((branch // replicate).to(tl.int64) * batch + image) * height + y) * width + x
            b = tl.load(
                source + pixel[:, None] * in_channels + n[None, :],
                mask=(inside & (row < end))[:, None] & (n < in_channels)[None, :],
                other=0.0,
            )
            sums = dot(tl.trans(a), b, sums, PRECISION)
        plane = (part * branches + branch).to(tl.int64) * out_channels
        entry = ((plane + m)[:, None] * in_channels + n[None, :]) * taps + tap
        tl.store(partial + entry, sums, mask=(m < out_channels)[:, None] & (n < in_channels)[None, :])


# Layers have 16 to 256 channels a branch and thousands of pixels: tall tiles. Three stages hide the memory's
# latency. Smaller tiles of more threads where a thread holds more than its part of the result: float32 without tensor
# cores keeps its operands in registers, and channels that nothing divides (an image has 3) are read one by one.
_KEY = ["height", "in_channels", "out_channels", "KERNEL", "STRIDE"]
_TILES = [
    config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    config(4, 3, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
]
_convolve = Kernel(_kernel, [*_TILES, config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32)], [*_KEY, "TRANSPOSED"])
_convolve_small = Kernel(_kernel, [config(8, 2, BLOCK_M=128, BLOCK_N=32, BLOCK_K=16)], [])
_weigh = Kernel(_weight_kernel, [*_TILES, config(8, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)], _KEY)
_weigh_small = Kernel(_weight_kernel, [config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16)], [])


def _unit(*channels: int) -> int:
    """8 where it divides all channel counts, so that 16 bytes of half precision are read at once; Triton by itself
    looks for 16, and an inverted residual has 24, 72 or 120."""
    return 8 if all(count % 8 == 0 for count in channels) else 1


def _precision(tensor: Tensor) -> str:
    """How float32 is multiplied: rounded to tf32 for the tensor cores only where torch allows that."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # also where allow_tf32 was set
    return "tf32" if tensor.dtype == torch.float32 and allowed else "ieee"


def _small(precision: str, unit: int, tensor: Tensor) -> bool:
    return unit == 1 or (tensor.dtype == torch.float32 and precision == "ieee")


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
        packed: ``weight`` is as :func:`hne_kernels.pack_weight` lays it out, and ``bias`` is given.
        residual: ``[G'', B, H', W', C_out]``, of which branch ``g // residual_replicate`` is added to branch g.
    """
    s = weight.stride()
    kernel_size = weight.shape[2] if packed else weight.shape[4]
    out_channels = bias.shape[1] if packed and bias is not None else weight.shape[1]
    strides = (s[0], s[1], s[5], s[4], s[2], s[3]) if packed else (s[0], checks.PANEL * s[1], *s[1:])
    shape = checks.geometry(x, weight.shape[0], out_channels, kernel_size, stride, padding)
    return _launch(
        x, weight, strides, bias, x.new_empty(shape), x.shape[0], weight.shape[0], replicate,
        residual, residual_replicate, kernel_size, stride, padding, False, activation,
    )  # fmt: skip


def _launch(
    source: Tensor, weight: Tensor, strides: tuple[int, ...], bias: Tensor | None, out: Tensor,
    parents: int, branches: int, replicate: int, residual: Tensor | None, residual_replicate: int,
    kernel_size: int, stride: int, padding: int, transposed: bool, activation: str,
) -> Tensor:  # fmt: skip
    precision, unit = _precision(source), _unit(source.shape[4], out.shape[4])
    kernel = _convolve_small if _small(precision, unit, source) else _convolve
    kernel(
        source.contiguous(), weight, None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(), out,
        parents, branches, replicate, residual_replicate, *source.shape[1:4], *out.shape[2:4],
        source.shape[4], out.shape[4], *strides,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding, TRANSPOSED=transposed,
        UNIT=unit, ACTIVATION=activation, PRECISION=precision,
    )  # fmt: skip
    return out


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
    s = weight.stride()
    return _launch(
        grad, weight, (s[0], checks.PANEL * s[2], s[2], s[1], *s[3:]), None,
        grad.new_empty(parents, grad.shape[1], height, width, in_channels),
        parents, branches, replicate, None, 1, kernel_size, stride, padding, True, "none",
    )  # fmt: skip


@op
def branch_conv2d_backward_weight(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, replicate: int
) -> Tensor:
    """The gradient of the weight of :func:`branch_conv2d`."""
    checks.same_kind("x", x, grad=grad)
    checks.family(x, grad, replicate)
    checks.convolution_gradient(
        grad, grad.shape[0], grad.shape[4], x.shape[2], x.shape[3], kernel_size, stride, padding, replicate
    )
    shape = (grad.shape[0], grad.shape[4], x.shape[4], kernel_size, kernel_size)
    tiles = shape[0] * -(-shape[1] // 64) * -(-shape[2] // 64) * kernel_size**2
    parts = -(-programs(x.device) // tiles)
    partial = x.new_empty((parts, *shape), dtype=torch.float32)
    precision, unit = _precision(x), _unit(x.shape[4], grad.shape[4])
    kernel = _weigh_small if _small(precision, unit, x) else _weigh
    kernel(
        grad.contiguous(), x.contiguous(), partial,
        grad.shape[0], replicate, *x.shape[1:4], *grad.shape[2:4], x.shape[4], grad.shape[4], parts,
        KERNEL=kernel_size, STRIDE=stride, PADDING=padding, UNIT=unit, PRECISION=precision,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


convolution.differentiate("triton_branch_conv2d")
