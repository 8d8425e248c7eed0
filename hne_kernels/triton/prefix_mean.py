"""A running sum over the members, written down as a mean wherever an ensemble ends: each logit is read once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..prefix_mean import LAYOUT, differentiate
from .launch import Kernel, config, op


@triton.jit
def _kernel(logits, out, elements, ENDS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """An ensemble ends after member n where bit n of ENDS is set."""
    for tile in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        store = out + offset
        for n in tl.static_range(MEMBERS):
            value = tl.load(logits + n * tl.cast(elements, tl.int64) + offset, mask=offset < elements, other=0.0)
            sums += value.to(tl.float32)
            if (ENDS >> n) & 1:
                tl.store(store, (sums / (n + 1)).to(out.dtype.element_ty), mask=offset < elements)
                store += elements


@triton.jit
def _backward_kernel(
    grad, out, elements,
    ENDS: tl.constexpr, ENSEMBLES: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the last member to the first: the gradients of the ensembles that a member belongs to add up."""
    for tile in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        offset = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        load = grad + (ENSEMBLES - 1) * tl.cast(elements, tl.int64) + offset
        for back in tl.static_range(MEMBERS):
            n = MEMBERS - 1 - back
            if (ENDS >> n) & 1:
                sums += tl.load(load, mask=offset < elements, other=0.0).to(tl.float32) / (n + 1)
                load -= elements
            store = out + n * tl.cast(elements, tl.int64) + offset
            tl.store(store, sums.to(out.dtype.element_ty), mask=offset < elements)


_CONFIGS = [config(4, BLOCK=1024)]  # 16 bytes a thread and member; nothing to choose
_mean = Kernel(_kernel, _CONFIGS, [])
_spread = Kernel(_backward_kernel, _CONFIGS, [])


def _ends(sizes: Sequence[int]) -> int:
    """The sizes as bits: a constant of the kernel, where a list would have to travel to the GPU."""
    return sum(1 << (int(size) - 1) for size in sizes)


@op
def prefix_mean(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """See :func:`hne_kernels.prefix_mean`."""
    checks.rank("logits", logits, 3, LAYOUT)
    sizes = checks.prefix_sizes(sizes, logits.shape[0])
    out = logits.new_empty(len(sizes), *logits.shape[1:])
    elements = logits.shape[1] * logits.shape[2]
    _mean(logits.contiguous(), out, elements, ENDS=_ends(sizes), MEMBERS=int(sizes[-1]))
    return out


@op
def prefix_mean_backward(grad: Tensor, sizes: Sequence[int], num_models: int) -> Tensor:
    """The gradient of the logits of :func:`prefix_mean`."""
    checks.rank("grad", grad, 3, LAYOUT)
    sizes = checks.prefix_sizes(sizes, num_models)
    checks.shape("grad", grad, (len(sizes), *grad.shape[1:]), LAYOUT)
    out = grad.new_empty(num_models, *grad.shape[1:])
    elements = grad.shape[1] * grad.shape[2]
    _spread(grad.contiguous(), out, elements, ENDS=_ends(sizes), ENSEMBLES=len(sizes), MEMBERS=int(num_models))
    return out


differentiate("triton_prefix_mean")
