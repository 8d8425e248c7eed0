"""Batch statistics of a feature map, combined from two numbers per channel and tile.

A kernel writes them to memory with an entry for every GROUP of pixels, which divides every tile, so that they are
combined without knowing the tile that the tuner chose. The order is fixed: the same input gives the same result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Kernel, config

GROUP = 64  # pixels that share an entry; divides the height of every tile of a kernel that writes entries
_GROUP = tl.constexpr(GROUP)


@triton.jit
def deviations(values, start, rows, BLOCK: tl.constexpr):
    """Mean of a tile whose first pixel is ``start``, and the sum of squared deviations from that mean.

    The mean of squares minus the squared mean would lose all digits where the mean is large.
    """
    here = (start + tl.arange(0, BLOCK) < rows)[:, None]
    count = tl.minimum(rows - start, BLOCK).to(tl.float32)
    mean = tl.sum(tl.where(here, values, 0.0), 0) / count
    apart = tl.where(here, values - mean[None, :], 0.0)
    return mean, tl.sum(apart * apart, 0)


@triton.jit
def write_partials(
    first, second, one, other, tile, rows, branch, branches, c, channels,
    REPEAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``one`` and ``other`` of a tile to the first of its entries in ``first`` and ``second``, then zeros.

    With REPEAT, all entries of the tile in ``first`` are ``one``.
    """
    write_partial(first, one, tile, rows, branch, branches, c, channels, REPEAT, BLOCK)
    write_partial(second, other, tile, rows, branch, branches, c, channels, False, BLOCK)


@triton.jit
def write_partial(
    partial, value, tile, rows, branch, branches, c, channels, REPEAT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write ``value`` of a tile to the first of its entries in ``partial``, then zeros or, with REPEAT, ``value``."""
    for group in tl.static_range(BLOCK // _GROUP):
        number = tile * (BLOCK // _GROUP) + group
        entry = (number.to(tl.int64) * branches + branch) * channels + c
        mask = (c < channels) & (number < tl.cdiv(rows, _GROUP))
        tl.store(partial + entry, value if group == 0 or REPEAT else tl.zeros_like(value), mask=mask)


@triton.jit
def _read(step, branch, c, rows, branches, channels, BLOCK_P: tl.constexpr):
    """Offsets of the entries, the number of pixels of each, and a mask."""
    part = step * BLOCK_P + tl.arange(0, BLOCK_P)
    count = tl.minimum(tl.maximum(rows - part * _GROUP, 0), _GROUP).to(tl.float32)[:, None]
    entry = (part.to(tl.int64)[:, None] * branches + branch) * channels + c[None, :]
    return entry, count, (part * _GROUP < rows)[:, None] & (c < channels)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    part_mean, part_square, mean, var, rows, branches, channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan, Golub & LeVeque (1979), for all parts at once: the differences of their means are deviations, too."""
    parts, tiles_c = tl.cdiv(rows, _GROUP), tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), branches * tiles_c, tl.num_programs(0)):
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        branch = tile // tiles_c
        total, square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(parts, BLOCK_P)):
            entry, count, mask = _read(step, branch, c, rows, branches, channels, BLOCK_P)
            total += count * tl.load(part_mean + entry, mask=mask, other=0.0)
        average = tl.sum(total, 0) / tl.maximum(rows, 1).to(tl.float32)
        for step in range(tl.cdiv(parts, BLOCK_P)):
            entry, count, mask = _read(step, branch, c, rows, branches, channels, BLOCK_P)
            apart = tl.load(part_mean + entry, mask=mask, other=0.0) - average[None, :]
            square += tl.load(part_square + entry, mask=mask, other=0.0) + count * apart * apart
        of = branch.to(tl.int64) * channels + c
        tl.store(mean + of, average, mask=c < channels)
        tl.store(var + of, tl.sum(square, 0) / tl.maximum(rows, 1).to(tl.float32), mask=c < channels)


# Few channels per tile, so that many programs share the little work.
_combine = Kernel(_combine_kernel, [config(8, BLOCK_P=128, BLOCK_C=16)], [])


def partial_statistics(out: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for two numbers per channel and group of pixels of ``out`` [G, B, H, W, C]: two of [groups, G, C]."""
    groups = -(-(out.shape[1] * out.shape[2] * out.shape[3]) // GROUP)
    shape = (groups, out.shape[0], out.shape[4])
    return out.new_empty(shape, dtype=torch.float32), out.new_empty(shape, dtype=torch.float32)


def combine(part_mean: Tensor, part_square: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``out`` from the means and deviations of its tiles; 0 for an empty batch."""
    branches, batch, height, width, channels = out.shape
    mean, var = (part_mean.new_empty(branches, channels) for _ in range(2))
    _combine(part_mean, part_square, mean, var, batch * height * width, branches, channels)
    return mean, var
