"""A bottleneck in one kernel, with the expanded feature map in the L2 cache instead of the memory.

A tile has all pixels of one or several samples of a branch, or a band of rows where a sample is large. A program
expands the pixels that its tile reads (neighbouring bands both compute their halo) and writes them to a buffer of its
own. It then convolves depthwise and projects 64 or 128 pixels at a time in registers, and adds the shortcut in float32.
Each program reuses its buffer for all its tiles, so the buffers stay in the L2 cache, and the memory bus carries the
input, the output and the weights.

**Alternatives, by count.** Per value of the expanded feature map, with 3x3 windows and C input channels:

- Nine products at shifted pixels take 9 C multiplications instead of C, and read the input nine times.
- ``tl.gather`` of a block writes it to shared memory and reads it back, one value per instruction, for each tap.
- Shifts as products with constant matrices take 9 x 64 multiplications for tiles of 64 pixels, 2 to 9 times as many as
  the expansion itself (C is 64 to 256), and need whole samples as tiles.
- The buffer takes one load of 16 bytes for 8 values and tap, mostly from the L1 cache, as the depthwise kernel does.

**Prediction** (a count of bytes and instructions of the machine code; nothing has been measured), for all bottlenecks
at batch 128 in bfloat16 on an H100 with 3.0 TB/s of memory, 5.5 TB/s of L2 cache and 0.93e12 instructions of a warp a
second. The time is that of the slowest part, if the others overlap with it; three or four kernels take at least the
time of their bytes.

=====================  ===============  ===================  =================  ==============
network                kernels: memory  one kernel: memory   L2 cache           instructions
=====================  ===============  ===================  =================  ==============
HNE-ResNet, N = 16     3.2 GB, 1.05 ms  1.4 GB, 0.46 ms      4.1 GB, 0.75 ms    0.44 ms
HNE-MobileNetV2 0.75   5.7 GB, 1.9 ms   0.4 GB, 0.14 ms      7.6 GB, 1.4 ms     not counted
=====================  ===============  ===================  =================  ==============

**Memory model.** Threads of a block read values of the buffer that other threads of the same block wrote. A barrier of
the block separates these reads from the writes before them, and from the writes for the next tile. It orders accesses
to the global memory among the threads of a block (PTX ISA, ``bar.sync``); blocks share no part of a buffer. The
compiler keeps loads and stores on their side of a barrier, except that it starts loads of a pipelined loop's next
iteration early. It pipelines innermost loops only, and none of them contains a barrier. The buffer is read by plain
loads, not through the read-only path.

Without tensor cores (float32 that is not rounded to TF32) arithmetic bounds the speed, and the bottleneck is three or
four kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import autocast, autograd, checks
from ..ops.fused_bottleneck import check
from .branch_conv2d import convolve, dot_precision
from .branch_depthwise_conv2d import convolve as convolve_depthwise
from .device import activate, dot, per_channel
from .launch import SIZES, Kernel, check_pixels, common_multiple, config, contiguous, op, programs

_PANEL = tl.constexpr(checks.PANEL)


@triton.jit
def _product(
    sums, source, pixel, here, weight, channels, n, columns,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums`` plus the product of pixels (rows of ``source``) and a packed 1x1 weight of ``channels`` inputs."""
    column = n // _PANEL * (channels * _PANEL) + n % _PANEL
    for step in range(tl.cdiv(channels, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k < channels
        a = tl.load(source + pixel[:, None] * channels + k[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weight + k[:, None] * _PANEL + column[None, :], mask=inside[:, None] & (n < columns)[None, :], other=0.0
        )
        sums = dot(a, b, sums, PRECISION)
    return sums


@triton.jit
def _depthwise(
    source, first, y, x, here, height, width, taps, bias, branch, m, middle,
    KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of channels ``m`` of expanded pixels; (y, x) is the first pixel of each window."""
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    known = m < middle
    for tap_y in range(KERNEL):
        row_inside = here & (y + tap_y >= 0) & (y + tap_y < height)
        for tap_x in range(KERNEL):
            inside = row_inside & (x + tap_x >= 0) & (x + tap_x < width)
            pixel = first + (y + tap_y) * width + x + tap_x
            value = tl.load(
                source + pixel[:, None] * middle + m[None, :], mask=inside[:, None] & known[None, :], other=0.0
            )
            tap = tl.load(taps + (tap_y * KERNEL + tap_x) * middle + m, mask=known, other=0.0)
            sums += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    sums = activate(sums + per_channel(bias, branch, m, middle), ACTIVATION)
    return sums.to(source.dtype.element_ty)


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    source, expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut, shortcut_bias,
    buffer, out,
    parents, branches, replicate, batch,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr, OUT_ROWS: tl.constexpr, ROWS: tl.constexpr,
    IN_CHANNELS: tl.constexpr, MIDDLE: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, IDENTITY: tl.constexpr,
    FINAL_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out``, by tiles of SAMPLES samples and OUT_ROWS rows, which are computed from ROWS rows.

    SAMPLES is 1 unless a tile has all rows, so the pixels of a tile are contiguous. WHOLE: BLOCK_E has all expanded
    channels, so they are convolved once for all output channels.
    """
    padding: tl.constexpr = KERNEL // 2
    groups, bands = tl.cdiv(batch, SAMPLES), tl.cdiv(OUT_HEIGHT, OUT_ROWS)
    chunks, tiles_n = tl.cdiv(MIDDLE, BLOCK_E), tl.cdiv(OUT_CHANNELS, BLOCK_N)
    buffer += tl.program_id(0).to(tl.int64) * (SAMPLES * ROWS * WIDTH) * MIDDLE
    for tile in range(tl.program_id(0), parents * groups * bands * replicate, tl.num_programs(0)):
        parent = tile // replicate // bands // groups  # children of a parent are adjacent, as they share the source
        number = parent * replicate + tile % replicate
        if number < branches:  # the last parent may have fewer children
            branch = number.to(tl.int64)
            image = tile // replicate // bands % groups * SAMPLES
            images = tl.minimum(SAMPLES, batch - image)
            out_y = tile // replicate % bands * OUT_ROWS
            start = tl.maximum(tl.minimum(out_y * STRIDE - padding, HEIGHT - ROWS), 0)
            read = ((parent.to(tl.int64) * batch + image) * HEIGHT + start) * WIDTH
            features = source + read * IN_CHANNELS
            pixels = images * ROWS * WIDTH
            weight = expand + branch * (tl.cdiv(MIDDLE, _PANEL) * _PANEL) * IN_CHANNELS
            for step in range(tl.cdiv(pixels, BLOCK_M) * chunks):
                pixel = step // chunks * BLOCK_M + tl.arange(0, BLOCK_M)
                m = step % chunks * BLOCK_E + tl.arange(0, BLOCK_E)
                here = pixel < pixels
                sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
                sums = _product(
                    sums, features, pixel, here, weight, IN_CHANNELS, m, MIDDLE, PRECISION, BLOCK_K,
                )  # fmt: skip
                sums = activate(sums + per_channel(expand_bias, branch, m, MIDDLE), ACTIVATION)
                tl.store(
                    buffer + pixel[:, None] * MIDDLE + m[None, :],
                    sums.to(buffer.dtype.element_ty),
                    mask=here[:, None] & (m < MIDDLE)[None, :],
                )
            tl.debug_barrier()  # the buffer is complete

            band = tl.minimum(OUT_ROWS, OUT_HEIGHT - out_y) * OUT_WIDTH
            pixels = images * band
            write = ((branch * batch + image) * OUT_HEIGHT + out_y) * OUT_WIDTH
            taps = depthwise + branch * (KERNEL * KERNEL) * MIDDLE
            weight = project + branch * (tl.cdiv(OUT_CHANNELS, _PANEL) * _PANEL) * MIDDLE
            for step in range(tl.cdiv(pixels, BLOCK_M)):
                pixel = step * BLOCK_M + tl.arange(0, BLOCK_M)
                here = pixel < pixels
                sample, within = pixel // band, pixel % band
                y = out_y + within // OUT_WIDTH
                x = within % OUT_WIDTH
                below, right = y * STRIDE - padding, x * STRIDE - padding
                first = (sample * ROWS - start) * WIDTH  # of the first row of the feature map
                if WHOLE:
                    channels = tl.arange(0, BLOCK_E)
                    whole = _depthwise(
                        buffer, first, below, right, here, HEIGHT, WIDTH, taps, depthwise_bias, branch,
                        channels, MIDDLE, KERNEL, ACTIVATION, BLOCK_M, BLOCK_E,
                    )  # fmt: skip
                for tile_n in range(tiles_n):
                    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
                    column = n // _PANEL * (MIDDLE * _PANEL) + n % _PANEL
                    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    if WHOLE:
                        b = tl.load(
                            weight + channels[:, None] * _PANEL + column[None, :],
                            mask=(channels < MIDDLE)[:, None] & (n < OUT_CHANNELS)[None, :],
                            other=0.0,
                        )
                        sums = dot(whole, b, sums, PRECISION)
                    else:
                        for chunk in tl.range(chunks, num_stages=1):
                            m = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
                            a = _depthwise(
                                buffer, first, below, right, here, HEIGHT, WIDTH, taps, depthwise_bias, branch,
                                m, MIDDLE, KERNEL, ACTIVATION, BLOCK_M, BLOCK_E,
                            )  # fmt: skip
                            b = tl.load(
                                weight + m[:, None] * _PANEL + column[None, :],
                                mask=(m < MIDDLE)[:, None] & (n < OUT_CHANNELS)[None, :],
                                other=0.0,
                            )
                            sums = dot(a, b, sums, PRECISION)
                    sums += per_channel(project_bias, branch, n, OUT_CHANNELS)
                    mask = here[:, None] & (n < OUT_CHANNELS)[None, :]
                    if shortcut is not None:
                        from_pixel = ((sample * HEIGHT) + y * STRIDE - start) * WIDTH + x * STRIDE
                        filters = shortcut + branch * (tl.cdiv(OUT_CHANNELS, _PANEL) * _PANEL) * IN_CHANNELS
                        sums = _product(
                            sums, features, from_pixel, here, filters, IN_CHANNELS, n, OUT_CHANNELS, PRECISION,
                            BLOCK_K,
                        )  # fmt: skip
                        sums += per_channel(shortcut_bias, branch, n, OUT_CHANNELS)
                    if IDENTITY:
                        from_pixel = (sample * HEIGHT - start) * WIDTH + y * WIDTH + x
                        added = tl.load(
                            features + from_pixel[:, None] * OUT_CHANNELS + n[None, :], mask=mask, other=0.0
                        )
                        sums += added.to(tl.float32)
                    tl.store(
                        out + (write + pixel)[:, None] * OUT_CHANNELS + n[None, :],
                        activate(sums, FINAL_ACTIVATION).to(out.dtype.element_ty),
                        mask=mask,
                    )
            tl.debug_barrier()  # the buffer may be overwritten


_KEY = ["HEIGHT", "IN_CHANNELS", "MIDDLE", "OUT_CHANNELS", "KERNEL", "STRIDE"]
# 128 registers, so that a multiprocessor has 16 warps. Twice the pixels read the weights half as often.
_TILES = [
    config(8, 3, registers=128, BLOCK_M=64, BLOCK_K=32),
    config(16, 3, registers=128, BLOCK_M=128, BLOCK_K=32),
]
_fused = Kernel(_kernel, _TILES, _KEY)
# More than 64 output channels, and operands of twice the size, take more registers.
_fused_wide = Kernel(
    _kernel,
    [config(16, 3, registers=128, BLOCK_M=64, BLOCK_K=32), config(16, 2, registers=128, BLOCK_M=128, BLOCK_K=32)],
    _KEY,
)
_fused_tf32 = Kernel(_kernel, [config(8, 3, registers=232, BLOCK_M=64, BLOCK_K=32)], [])
# Channel counts that 8 does not divide are read one by one, with an address in registers for each.
_fused_small = Kernel(_kernel, [config(4, BLOCK_M=64, BLOCK_K=16)], [])

_BUFFER = 2**16  # bytes for the expanded pixels of a tile, unless a row takes more: 34 MB for 528 programs
_TILE_PIXELS = 128  # of the output, where samples are smaller
_LEAST_PIXELS = 16  # of a band: the least rows of a matrix instruction


@dataclass(frozen=True)
class _Tile:
    """Output rows of a tile, source rows that they are computed from, and samples (1 unless the rows are all)."""

    out_rows: int
    rows: int
    samples: int


def _tile(
    branches: int, batch: int, size: tuple[int, int], out_size: tuple[int, int], row_bytes: int,
    window: tuple[int, int], device: torch.device,
) -> _Tile:  # fmt: skip
    """As large as the buffer allows, but small enough that all programs have a tile.

    The sizes are constants of the kernel: with another batch, it may be compiled again in the first call.

    Args:
        branches, batch: of the output; batch may be symbolic.
        size, out_size: height and width of source and output.
        row_bytes: of a row of the expanded feature map.
        window: size and stride.
        device: of the tensors.
    """
    (height, _), (out_height, out_width), (kernel_size, stride) = size, out_size, window

    def rows(out_rows: int) -> int:
        return min(height, (out_rows - 1) * stride + kernel_size)

    out_rows, bands = out_height, 1
    while out_rows > 1 and rows(out_rows) * row_bytes > _BUFFER:
        bands += 1
        out_rows = -(-out_height // bands)
    samples = 1
    if isinstance(batch, int):
        wanted = programs(device)
        while branches * batch * bands < wanted and (out_rows // 2) * out_width >= _LEAST_PIXELS:
            out_rows = -(-out_rows // 2)
            bands = -(-out_height // out_rows)
        if bands == 1:
            most = min(_TILE_PIXELS // max(out_height * out_width, 1), _BUFFER // max(height * row_bytes, 1), batch)
            samples = max(1, min(most, branches * batch // wanted))
    return _Tile(out_rows, height if samples > 1 else rows(out_rows), samples)


@dataclass(frozen=True)
class _Blocks:
    """Sizes of blocks: expanded channels, all of them or a part, and output channels."""

    expanded: int
    outputs: int
    whole: bool


def _blocks(middle: int, out_channels: int, multiple: int) -> _Blocks | None:
    """None if the depthwise convolution would be repeated for several blocks of output channels."""
    most = 64 if multiple > 1 else 32
    if middle <= most:
        return _Blocks(_padded(middle), min(_padded(out_channels), most), True)
    if out_channels > 2 * most:
        return None
    outputs, sizes = _padded(out_channels), (most, most // 2)
    # The block with the least padding; the larger one would spill registers where output channels take many.
    expanded = min(sizes[outputs > most :], key=lambda size: -(-middle // size) * size)
    return _Blocks(expanded, outputs, False)


def _padded(channels: int) -> int:
    """The smallest power of two that holds the channels and that a matrix instruction takes."""
    return max(16, 1 << (channels - 1).bit_length())


def _compose(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    shortcut: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    replicate: int,
    activation: str,
    identity: bool,
    final_activation: str,
) -> Tensor:
    """The bottleneck as three or four kernels; activations, sum and shortcut are epilogues."""
    residual, residual_replicate = x if identity else None, replicate
    if shortcut is not None:
        residual = convolve(x, shortcut, shortcut_bias, stride, 0, replicate, packed=True)
        residual_replicate = 1
    y = convolve(x, expand, expand_bias, 1, 0, replicate, packed=True, activation=activation)
    filters = depthwise.permute(0, 3, 1, 2)
    padding = depthwise.shape[1] // 2
    y = convolve_depthwise(y, filters, depthwise_bias, stride, padding, 1, activation=activation)
    return convolve(
        y, project, project_bias, 1, 0, 1,
        packed=True, activation=final_activation, residual=residual, residual_replicate=residual_replicate,
    )  # fmt: skip


@op
def fused_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    shortcut: Tensor | None,
    shortcut_bias: Tensor | None,
    stride: int,
    replicate: int,
    activation: str,
    identity: bool,
    final_activation: str,
) -> Tensor:
    """See :func:`hne_kernels.fused_bottleneck`."""
    weights = (expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut, shortcut_bias)
    options = (stride, replicate, activation, identity, final_activation)
    shape = check(x, *weights, *options)
    x = x.contiguous()
    branches, batch, out_height, out_width, out_channels = shape
    height, width, in_channels = x.shape[2:]
    kernel_size, middle = depthwise.shape[2:]
    precision = dot_precision(x)
    multiple = common_multiple(in_channels, middle, out_channels)
    blocks = _blocks(middle, out_channels, multiple)
    if blocks is None or (x.dtype == torch.float32 and precision == "ieee") or not _indexable(x, shape, middle):
        return _compose(x, *weights, *options)
    check_pixels("x", x.shape)
    tile = _tile(
        branches, batch, (height, width), (out_height, out_width), width * middle * x.element_size(),
        (kernel_size, stride), x.device,
    )  # fmt: skip
    buffer = x.new_empty(programs(x.device), tile.samples * tile.rows * width * middle)
    out = x.new_empty(shape)
    kernel = _fused_wide if blocks.outputs > 64 else _fused
    if multiple == 1:
        kernel = _fused_small
    elif precision == "tf32":
        kernel = _fused_tf32
    kernel(
        x, *(contiguous(weight) for weight in weights), buffer, out,
        x.shape[0], branches, replicate, batch,
        HEIGHT=height, WIDTH=width, OUT_HEIGHT=out_height, OUT_WIDTH=out_width,
        SAMPLES=tile.samples, OUT_ROWS=tile.out_rows, ROWS=tile.rows,
        IN_CHANNELS=in_channels, MIDDLE=middle, OUT_CHANNELS=out_channels,
        KERNEL=kernel_size, STRIDE=stride, ACTIVATION=activation, IDENTITY=identity, FINAL_ACTIVATION=final_activation,
        PRECISION=precision, WHOLE=blocks.whole, BLOCK_E=blocks.expanded, BLOCK_N=blocks.outputs,
    )  # fmt: skip
    return out


def _indexable(x: Tensor, shape: tuple[int, ...], middle: int) -> bool:
    """Whether sizes of a sample are known, and 32 bits index the values of a sample and of a weight."""
    sizes = (*x.shape[2:], *shape[2:], middle)
    if not all(isinstance(size, int) for size in sizes):
        return False
    channels = max(x.shape[4], shape[4], middle)
    return x.shape[2] * x.shape[3] * channels < 2**30 and (channels + 128) ** 2 < 2**31


autocast.register("triton_fused_bottleneck")
autograd.register_inference("triton_fused_bottleneck")
