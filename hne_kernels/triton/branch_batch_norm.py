"""Batch norm in training: statistics in parts, their union, then normalisation, sum and activation in one pass.

The map is read twice forwards (statistics, normalisation) and twice backwards: a normalised value needs the statistics
of all. Parts are summed in a fixed order, so the same input gives the same result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..branch_batch_norm import differentiate
from .device import activate
from .launch import SIZES, Kernel, config, op, programs


@triton.jit
def _part(tile, rows, channels, branches, parts, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which branch, channels and rows a tile of the statistics has."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    branch = (tile // tiles_c % branches).to(tl.int64)
    part = (tile // tiles_c // branches).to(tl.int64)
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_M) * BLOCK_M
    start = tl.minimum(part * length, rows)
    return branch, c, part, start, tl.minimum(start + length, rows)


@triton.jit(do_not_specialize=SIZES)
def _statistics_kernel(
    x, part_mean, part_square, rows, branches, channels, parts,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of each part and the sum of its squared deviations, by Welford's recurrence.

    A mean of squares minus a squared mean would lose all digits where the mean is large.
    """
    for tile in range(tl.program_id(0), tl.cdiv(channels, BLOCK_C) * branches * parts, tl.num_programs(0)):
        branch, c, part, start, end = _part(tile, tl.cast(rows, tl.int64), channels, branches, parts, BLOCK_M, BLOCK_C)
        lane = tl.arange(0, BLOCK_M)
        mean, square = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(end - start, BLOCK_M).to(tl.int32)):
            row = start + step * BLOCK_M + lane
            mask = (row < end)[:, None] & (c < channels)[None, :]
            value = tl.load(x + (branch * rows + row)[:, None] * channels + c[None, :], mask=mask, other=0.0)
            deviation = value.to(tl.float32) - mean
            moved = mean + deviation * (1.0 / (step + 1))
            square += tl.where(mask, deviation * (value.to(tl.float32) - moved), 0.0)
            mean = tl.where(mask, moved, mean)
        # Each lane has every BLOCK_M-th row; what they differ in belongs to the part's deviations (Chan et al. 1979).
        count = tl.maximum((end - start - lane + BLOCK_M - 1) // BLOCK_M, 0).to(tl.float32)[:, None]
        average = tl.sum(count * mean, 0) / tl.maximum(end - start, 1).to(tl.float32)
        apart = mean - average[None, :]
        deviations = tl.sum(square + count * apart * apart, 0)
        entry = (part * branches + branch) * channels + c
        tl.store(part_mean + entry, average, mask=c < channels)
        tl.store(part_square + entry, deviations, mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def _unite_kernel(
    part_mean, part_square, mean, var, rows, branches, channels, parts,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance from those of the parts."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), tiles_c * branches, tl.num_programs(0)):
        total, total_square = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
        before = tl.zeros((), tl.int64)
        for part in range(parts):
            _, c, number, start, end = _part(
                tile + part * branches * tiles_c, tl.cast(rows, tl.int64), channels, branches, parts, BLOCK_M, BLOCK_C
            )
            entry = (number * branches + tile // tiles_c) * channels + c
            apart = tl.load(part_mean + entry, mask=c < channels, other=0.0) - total
            share = (end - start).to(tl.float32) / tl.maximum(end, 1).to(tl.float32)
            total += apart * share
            total_square += tl.load(part_square + entry, mask=c < channels, other=0.0)
            total_square += apart * apart * share * before.to(tl.float32)
            before = end
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        entry = (tile // tiles_c).to(tl.int64) * channels + c
        biased = total_square / tl.maximum(rows, 1).to(tl.float32)
        tl.store(mean + entry, total.to(mean.dtype.element_ty), mask=c < channels)
        tl.store(var + entry, biased.to(var.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def _normalise_kernel(
    x, weight, bias, mean, var, residual, out, rows, branches, channels, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``."""
    tiles_m, tiles_c = tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), branches * tiles_m * tiles_c, tl.num_programs(0)):
        branch = (tile // tiles_c // tiles_m).to(tl.int64)
        row = (tile // tiles_c % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        of = branch * channels + c
        known = c < channels
        centre = tl.load(mean + of, mask=known, other=0.0).to(tl.float32)
        scale = tl.load(weight + of, mask=known, other=0.0).to(tl.float32)
        scale = scale / tl.sqrt(tl.load(var + of, mask=known, other=1.0).to(tl.float32) + eps)
        shift = tl.load(bias + of, mask=known, other=0.0).to(tl.float32)
        mask = (row < rows)[:, None] & known[None, :]
        at = (branch * rows + row)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        y = (value - centre[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _before_activation(grad, y, at, mask, ACTIVATION: tl.constexpr):
    """The gradient, zero where the activation is flat."""
    above = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        value = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        flat = value <= 0
        if ACTIVATION == "relu6":
            flat = flat | (value >= 6)
        above = tl.where(flat, 0.0, above)
    return above


@triton.jit(do_not_specialize=SIZES)
def _sums_kernel(
    grad, x, y, mean, var, part_weight, part_bias, rows, branches, channels, parts, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias from each part of the rows."""
    for tile in range(tl.program_id(0), tl.cdiv(channels, BLOCK_C) * branches * parts, tl.num_programs(0)):
        branch, c, part, start, end = _part(tile, tl.cast(rows, tl.int64), channels, branches, parts, BLOCK_M, BLOCK_C)
        of = branch * channels + c
        known = c < channels
        centre = tl.load(mean + of, mask=known, other=0.0).to(tl.float32)
        deviation = tl.sqrt(tl.load(var + of, mask=known, other=1.0).to(tl.float32) + eps)
        along, total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(end - start, BLOCK_M).to(tl.int32)):
            row = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (row < end)[:, None] & known[None, :]
            at = (branch * rows + row)[:, None] * channels + c[None, :]
            above = _before_activation(grad, y, at, mask, ACTIVATION)
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            along += above * (value - centre[None, :])
            total += above
        entry = (part * branches + branch) * channels + c
        tl.store(part_weight + entry, tl.sum(along, 0) / deviation, mask=known)
        tl.store(part_bias + entry, tl.sum(total, 0), mask=known)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad, x, y, weight, mean, var, grad_weight, grad_bias, grad_x, grad_residual, rows, branches, channels, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Ioffe & Szegedy (2015), section 3: the gradient less its mean and its component along the normalised x."""
    tiles_m, tiles_c = tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), branches * tiles_m * tiles_c, tl.num_programs(0)):
        branch = (tile // tiles_c // tiles_m).to(tl.int64)
        row = (tile // tiles_c % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        of = branch * channels + c
        known = c < channels
        centre = tl.load(mean + of, mask=known, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.load(var + of, mask=known, other=1.0).to(tl.float32) + eps)
        scale = tl.load(weight + of, mask=known, other=0.0).to(tl.float32) * inverse
        along = tl.load(grad_weight + of, mask=known, other=0.0) / rows
        average = tl.load(grad_bias + of, mask=known, other=0.0) / rows
        mask = (row < rows)[:, None] & known[None, :]
        at = (branch * rows + row)[:, None] * channels + c[None, :]
        above = _before_activation(grad, y, at, mask, ACTIVATION)
        normal = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - centre[None, :]) * inverse[None, :]
        below = (above - average[None, :] - normal * along[None, :]) * scale[None, :]
        tl.store(grad_x + at, below.to(grad_x.dtype.element_ty), mask=mask)
        if grad_residual is not None:
            tl.store(grad_residual + at, above.to(grad_residual.dtype.element_ty), mask=mask)


# Memory is all that counts: 16-byte accesses over a run of channels.
_CONFIGS = [config(4, BLOCK_M=32, BLOCK_C=64), config(4, BLOCK_M=128, BLOCK_C=16)]
_KEY = ["channels"]
_normalise = Kernel(_normalise_kernel, _CONFIGS, _KEY)
_backward = Kernel(_backward_kernel, _CONFIGS, _KEY)
_sums = Kernel(_sums_kernel, _CONFIGS, _KEY)
# These two must cut the rows alike.
_statistics = Kernel(_statistics_kernel, _CONFIGS[:1], [])
_unite = Kernel(_unite_kernel, _CONFIGS[:1], [])


def _parts(x: Tensor) -> int:
    """Parts of the rows that keep the whole GPU busy."""
    tiles = x.shape[0] * -(-x.shape[4] // 64)
    return -(-programs(x.device) // tiles)


@op
def branch_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`hne_kernels.branch_batch_norm`."""
    checks.batch_norm(x, weight, bias, residual, activation, eps)
    x, parts = x.contiguous(), _parts(x)
    branches, batch, height, width, channels = x.shape
    size = (batch * height * width, branches, channels)
    part_mean, part_square = (x.new_empty((parts, branches, channels), dtype=torch.float32) for _ in range(2))
    mean, var = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    y = x.new_empty(x.shape)
    _statistics(x, part_mean, part_square, *size, parts)
    _unite(part_mean, part_square, mean, var, *size, parts)
    _normalise(
        x, weight.contiguous(), bias.contiguous(), mean, var,
        None if residual is None else residual.contiguous(), y, *size, eps, ACTIVATION=activation,
    )  # fmt: skip
    return y, mean, var


@op
def branch_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: bool,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual (empty where there is none) of :func:`branch_batch_norm`."""
    checks.batch_norm(x, weight, weight, None, activation, eps)
    for name, tensor in (("grad", grad), ("y", y)):
        checks.shape(name, tensor, tuple(x.shape), "as x")
    for name, tensor in (("mean", mean), ("var", var)):
        checks.shape(name, tensor, tuple(weight.shape), "as weight")
    grad, x, y, weight = grad.contiguous(), x.contiguous(), y.contiguous(), weight.contiguous()
    mean, var = mean.contiguous(), var.contiguous()
    parts = _parts(x)
    branches, batch, height, width, channels = x.shape
    size = (batch * height * width, branches, channels)
    part_weight, part_bias = (x.new_empty((parts, branches, channels), dtype=torch.float32) for _ in range(2))
    _sums(grad, x, y, mean, var, part_weight, part_bias, *size, parts, eps, ACTIVATION=activation)
    grad_weight, grad_bias = part_weight.sum(0), part_bias.sum(0)
    grad_x = x.new_empty(x.shape)
    grad_residual = x.new_empty(x.shape if residual else (0,))
    _backward(
        grad, x, y, weight, mean, var, grad_weight, grad_bias, grad_x, grad_residual if residual else None,
        *size, eps, ACTIVATION=activation,
    )  # fmt: skip
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_residual


differentiate("triton_branch_batch_norm")
