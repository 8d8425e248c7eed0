"""A running sum over the members, written as a mean where an ensemble ends, so that each logit is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..ops.prefix_mean import LAYOUT, differentiate
from .launch import Kernel, config, op


@triton.jit
def _kernel(
    logits, out, carry, elements,
    ENDS: tl.constexpr, BEFORE: tl.constexpr, ENSEMBLES: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of ensembles that end in this group of members.

    An ensemble ends after member BEFORE + n where bit n of ENDS is set. ENSEMBLES have ended before this group.
    """
    elements = tl.cast(elements, tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(elements, BLOCK).to(tl.int32), tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < elements
        sums = tl.zeros((BLOCK,), tl.float32)
        if BEFORE > 0:
            sums += tl.load(carry + offset, mask=mask, other=0.0)
        store = out + ENSEMBLES * elements + offset
        for n in tl.static_range(BEFORE, BEFORE + MEMBERS):
            sums += tl.load(logits + n * elements + offset, mask=mask, other=0.0).to(tl.float32)
            if (ENDS >> (n - BEFORE)) & 1:
                tl.store(store, (sums / (n + 1)).to(out.dtype.element_ty), mask=mask)
                store += elements
        if carry is not None:
            tl.store(carry + offset, sums, mask=mask)


@triton.jit
def _backward_kernel(
    grad, out, carry, elements,
    ENDS: tl.constexpr, BEFORE: tl.constexpr, ENSEMBLES: tl.constexpr, MEMBERS: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each member, from last to first: the sum of the gradients of its ensembles.

    ENSEMBLES have ended before or in this group of members; LAST if there is no later group.
    """
    elements = tl.cast(elements, tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(elements, BLOCK).to(tl.int32), tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < elements
        sums = tl.zeros((BLOCK,), tl.float32)
        if not LAST:
            sums += tl.load(carry + offset, mask=mask, other=0.0)
        load = grad + (ENSEMBLES - 1) * elements + offset
        for back in tl.static_range(MEMBERS):
            n = BEFORE + MEMBERS - 1 - back
            if (ENDS >> (n - BEFORE)) & 1:
                sums += tl.load(load, mask=mask, other=0.0).to(tl.float32) / (n + 1)
                load -= elements
            tl.store(out + n * elements + offset, sums.to(out.dtype.element_ty), mask=mask)
        if carry is not None:
            tl.store(carry + offset, sums, mask=mask)


_CONFIGS = [config(8, BLOCK=1024)]  # 8 or 16 bytes per thread and member
_mean = Kernel(_kernel, _CONFIGS, [])
_spread = Kernel(_backward_kernel, _CONFIGS, [])
_GROUP = 16  # members per launch, an unrolled loop; the next launch continues with their sums


@dataclass(frozen=True)
class _Group:
    """Consecutive members."""

    before: int
    members: int
    ensembles: int  # that end before
    ends: int  # as bits, a constant of the kernel, so that no list is copied to the GPU

    @property
    def ensembles_after(self) -> int:
        return self.ensembles + self.ends.bit_count()


def _groups(sizes: Sequence[int], members: int) -> list[_Group]:
    groups = []
    for before in range(0, members, _GROUP):
        ends = sum(1 << (size - before - 1) for size in sizes if before < size <= before + _GROUP)
        ended = sum(size <= before for size in sizes)
        groups.append(_Group(before, min(_GROUP, members - before), ended, ends))
    return groups


def _carry(like: Tensor, elements: int, groups: list[_Group]) -> Tensor | None:
    return like.new_empty(elements, dtype=torch.float32) if len(groups) > 1 else None


@op
def prefix_mean(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """See :func:`hne_kernels.prefix_mean`."""
    checks.rank("logits", logits, 3, LAYOUT)
    sizes = [int(size) for size in checks.prefix_sizes(sizes, logits.shape[0])]
    logits, out = logits.contiguous(), logits.new_empty(len(sizes), *logits.shape[1:])
    elements, groups = logits.shape[1] * logits.shape[2], _groups(sizes, sizes[-1])
    carry = _carry(logits, elements, groups)
    for group in groups:
        _mean(
            logits, out, carry, elements,
            ENDS=group.ends, BEFORE=group.before, ENSEMBLES=group.ensembles, MEMBERS=group.members,
        )  # fmt: skip
    return out


@op
def prefix_mean_backward(grad: Tensor, sizes: Sequence[int], num_models: int) -> Tensor:
    """The gradient of the logits of :func:`prefix_mean`."""
    checks.rank("grad", grad, 3, LAYOUT)
    sizes = [int(size) for size in checks.prefix_sizes(sizes, num_models)]
    checks.shape("grad", grad, (len(sizes), *grad.shape[1:]), LAYOUT)
    grad, out = grad.contiguous(), grad.new_empty(num_models, *grad.shape[1:])
    elements, groups = grad.shape[1] * grad.shape[2], _groups(sizes, int(num_models))
    carry = _carry(grad, elements, groups)
    for group in reversed(groups):
        _spread(
            grad, out, carry, elements,
            ENDS=group.ends, BEFORE=group.before, ENSEMBLES=group.ensembles_after, MEMBERS=group.members,
            LAST=group is groups[-1],
        )  # fmt: skip
    return out


differentiate("triton_prefix_mean")
