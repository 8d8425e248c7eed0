"""Normalisation by given statistics, sum and activation in one pass; the gradients in another.

Memory bounds the speed: both passes read each feature map once and write each once. Backward sums the gradients of
scale and shift in parts, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..ops.branch_normalize import check, check_residual, differentiate, writes_residual
from ..ops.normalization import check_norm
from .conv_norm import norm_gradient
from .device import activate, denormalize_sum, norm_of, normalize
from .launch import SIZES, Kernel, config, contiguous, op, split


@triton.jit
def part_of_rows(tile, rows, channels, branches, parts, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Branch, channels, part and range of rows (64 bits) of a tile, where the rows are split into parts."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    branch = (tile // tiles_c % branches).to(tl.int64)
    part = (tile // tiles_c // branches).to(tl.int64)
    length = tl.cdiv(tl.cdiv(rows, parts), BLOCK_M) * BLOCK_M
    start = tl.minimum(part * length, rows)
    return branch, c, part, start, tl.minimum(start + length, rows)


@triton.jit(do_not_specialize=SIZES)
def _kernel(
    x, norm, residual, residual_norm, out, rows, branches, channels,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = activation((x - mean) * scale + shift + residual)``; with ``residual_norm``, it is normalised, too."""
    rows = tl.cast(rows, tl.int64)
    tiles_m, tiles_c = tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), (branches * tiles_m * tiles_c).to(tl.int32), tl.num_programs(0)):
        branch = tile // tiles_c // tiles_m
        row = tile // tiles_c % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        at = (branch * rows + row)[:, None] * channels + c[None, :]
        mean, scale, shift = norm_of(norm, branch, branches, c, channels)
        y = normalize(tl.load(x + at, mask=mask, other=0.0), mean, scale, shift)
        if residual is not None:
            added = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
            if residual_norm is not None:
                mean, scale, shift = norm_of(residual_norm, branch, branches, c, channels)
                added = normalize(added, mean, scale, shift)
            y += added
        tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad, x, y, norm, residual, residual_norm, grad_x, grad_residual, part_scale, part_shift, part_residual,
    rows, branches, channels, parts,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of x and residual, and those of scale and shift for each part of the rows.

    With ``residual_norm``, ``part_residual`` has the gradients of its scale; those of its shift are the same as of the
    other shift.
    """
    for tile in range(tl.program_id(0), tl.cdiv(channels, BLOCK_C) * branches * parts, tl.num_programs(0)):
        branch, c, part, start, end = part_of_rows(
            tile, tl.cast(rows, tl.int64), channels, branches, parts, BLOCK_M, BLOCK_C
        )
        mean, scale, _ = norm_of(norm, branch, branches, c, channels)
        along, total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32), tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if residual_norm is not None:
            residual_mean, residual_scale, _ = norm_of(residual_norm, branch, branches, c, channels)
            along_residual = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for step in range(tl.cdiv(end - start, BLOCK_M).to(tl.int32)):
            row = start + step * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (row < end)[:, None] & (c < channels)[None, :]
            at = (branch * rows + row)[:, None] * channels + c[None, :]
            above = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            result = above if ACTIVATION == "none" else tl.load(y + at, mask=mask, other=0.0)
            original = tl.load(x + at, mask=mask, other=0.0)
            of_x, above, by_scale = denormalize_sum(above, original, result, mean, scale, ACTIVATION)
            tl.store(grad_x + at, of_x.to(grad_x.dtype.element_ty), mask=mask)
            along += by_scale
            total += above
            if residual_norm is not None:
                added = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
                along_residual += above * (added - residual_mean)
                above *= residual_scale
            if grad_residual is not None:
                tl.store(grad_residual + at, above.to(grad_residual.dtype.element_ty), mask=mask)
        entry = (part * branches + branch) * channels + c
        tl.store(part_scale + entry, tl.sum(along, 0), mask=c < channels)
        tl.store(part_shift + entry, tl.sum(total, 0), mask=c < channels)
        if residual_norm is not None:
            tl.store(part_residual + entry, tl.sum(along_residual, 0), mask=c < channels)


# Contiguous channels, for accesses of 16 bytes.
_CONFIGS = [config(4, BLOCK_M=32, BLOCK_C=64), config(4, BLOCK_M=128, BLOCK_C=16)]
_KEY = ["channels"]
_normalize = Kernel(_kernel, _CONFIGS, _KEY)
_backward = Kernel(_backward_kernel, _CONFIGS, _KEY)


def compute(x: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, activation: str) -> Tensor:
    """``activation((x - mean) * scale + shift + residual)`` in one kernel."""
    branches, batch, height, width, channels = x.shape
    y = x.new_empty(x.shape)
    _normalize(
        x.contiguous(), norm.contiguous(), contiguous(residual), contiguous(residual_norm), y,
        batch * height * width, branches, channels, ACTIVATION=activation,
    )  # fmt: skip
    return y


@op
def branch_normalize(
    x: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None, activation: str
) -> Tensor:
    """See :func:`hne_kernels.branch_normalize`."""
    check(x, norm, residual, residual_norm, activation)
    return compute(x, norm, residual, residual_norm, activation)


@op
def branch_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, norm: Tensor, residual: Tensor | None, residual_norm: Tensor | None,
    activation: str, has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, norm, residual and residual_norm of :func:`branch_normalize`; of the last two empty if not
    there.

    Without an activation that of a residual without a normalisation is ``grad`` itself, and left empty. The residual
    is only read together with its normalisation.
    """
    checks.rank("x", x, 5, checks.CONV_INPUT)
    checks.activation("activation", activation)
    checks.same_kind("x", x, grad=grad, y=y)
    for name, tensor in (("grad", grad), ("y", y)):
        checks.shape(name, tensor, tuple(x.shape), "as x")
    check_norm("norm", norm, x, x.shape[4])
    check_residual(x, residual, residual_norm)
    if residual_norm is not None and not has_residual:
        raise ValueError("has_residual: expected True with residual_norm, got False")
    branches, batch, height, width, channels = x.shape
    parts = split(branches * -(-channels // 64), x.device)
    part_scale, part_shift = (x.new_empty((parts, branches, channels), dtype=torch.float32) for _ in range(2))
    part_residual = None if residual_norm is None else torch.empty_like(part_scale)
    grad_x = x.new_empty(x.shape)
    grad_residual = x.new_empty(x.shape) if writes_residual(residual_norm, activation, has_residual) else None
    _backward(
        grad.contiguous(), x.contiguous(), y.contiguous(), norm.contiguous(),
        contiguous(residual), contiguous(residual_norm), grad_x, grad_residual, part_scale, part_shift, part_residual,
        batch * height * width, branches, channels, parts, ACTIVATION=activation,
    )  # fmt: skip
    grad_residual_norm = norm.new_empty(0)
    if residual_norm is not None and part_residual is not None:
        grad_residual_norm = norm_gradient(residual_norm, part_shift, part_residual)
    grad_residual = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, norm_gradient(norm, part_shift, part_scale), grad_residual, grad_residual_norm


differentiate("triton_branch_normalize")
