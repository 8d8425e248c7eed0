"""The objective and its gradient, one program per sample.

The logits of a sample (16 leaves x 100 classes: 6 KB) are read twice, first for the maxima and sums of all softmaxes,
then, from the cache, for the gradient. So each logit and each gradient crosses the memory bus once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.hierarchical_distillation_loss import check, differentiate
from .launch import Kernel, config, op

_LOWEST = tl.constexpr(-3.4e38)  # start of a running maximum; unlike -inf, it can be subtracted from itself


@triton.jit
def _load(logits, models, batch, classes, sample, start, MODELS: tl.constexpr, BLOCK: tl.constexpr):
    """Logits [MODELS, BLOCK] of a sample from class ``start`` on, zero beyond the last, and the class numbers."""
    member, label = tl.arange(0, MODELS), start + tl.arange(0, BLOCK)
    row = tl.cast(member, tl.int64) * batch + sample
    mask = (member < models)[:, None] & (label < classes)[None, :]
    return tl.load(logits + row[:, None] * classes + label[None, :], mask=mask, other=0.0).to(tl.float32), label


@triton.jit
def _prefix(values, size, temperature):
    """Logits of the ensemble of the first ``size`` leaves, over the temperature (eq. 1)."""
    member = tl.arange(0, values.shape[0])
    return tl.sum(tl.where((member < size)[:, None], values, 0.0), 0) / size / temperature


@triton.jit
def _kernel(
    logits, target, losses, grad, models, batch, classes, alpha, temperature,
    STUDENTS: tl.constexpr, MODELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each sample, and the gradient of the mean loss (eq. 9 and 12)."""
    member = tl.arange(0, MODELS)
    ensemble = tl.arange(0, 2 * MODELS)  # the students, then the teacher
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        right = tl.load(target + sample)
        highest, total = tl.full((MODELS,), _LOWEST, tl.float32), tl.zeros((MODELS,), tl.float32)
        prefix_highest = tl.full((2 * MODELS,), _LOWEST, tl.float32)
        prefix_total = tl.zeros((2 * MODELS,), tl.float32)
        for start in range(0, classes, BLOCK):
            values, label = _load(logits, models, batch, classes, sample, start, MODELS, BLOCK)
            here = label < classes
            peak = tl.maximum(highest, tl.max(tl.where(here[None, :], values, _LOWEST), 1))
            part = tl.sum(tl.where(here[None, :], tl.exp(values - peak[:, None]), 0.0), 1)
            highest, total = peak, total * tl.exp(highest - peak) + part
            for p in tl.static_range(STUDENTS + 1):
                mean = _prefix(values, (1 << p) if p < STUDENTS else models, temperature)
                before = tl.max(tl.where(ensemble == p, prefix_highest, _LOWEST), 0)
                top = tl.maximum(before, tl.max(tl.where(here, mean, _LOWEST), 0))
                new = tl.sum(tl.where(here, tl.exp(mean - top), 0.0), 0)
                prefix_total = tl.where(ensemble == p, prefix_total * tl.exp(before - top) + new, prefix_total)
                prefix_highest = tl.where(ensemble == p, top, prefix_highest)

        independent, distilled = tl.zeros((MODELS,), tl.float32), 0.0
        for start in range(0, classes, BLOCK):
            values, label = _load(logits, models, batch, classes, sample, start, MODELS, BLOCK)
            here = label < classes
            log_total = tl.log(total)
            hit = (label == right)[None, :] & here[None, :]
            # log softmax = value - maximum - log(sum); in this order, a large maximum costs no digits.
            log_probability = values - highest[:, None] - log_total[:, None]
            independent -= tl.sum(tl.where(hit, log_probability, 0.0), 1)
            slope = (1 - alpha) * (tl.exp(log_probability) - tl.where(hit, 1.0, 0.0))
            if STUDENTS > 0:
                taught = _log_softmax(values, models, temperature, ensemble == STUDENTS, prefix_highest, prefix_total)
                teacher = tl.exp(taught)
                for p in tl.static_range(STUDENTS):
                    answer = _log_softmax(values, 1 << p, temperature, ensemble == p, prefix_highest, prefix_total)
                    distilled -= tl.sum(tl.where(here, teacher * answer, 0.0), 0)
                    # T^2 from the objective, 1 / T and 1 / size from the student's logits.
                    pull = (alpha * temperature / (1 << p)) * (tl.exp(answer) - teacher)
                    slope += tl.where((member < (1 << p))[:, None], pull[None, :], 0.0)
            row = tl.cast(member, tl.int64) * batch + sample
            tl.store(
                grad + row[:, None] * classes + label[None, :],
                (slope / batch).to(grad.dtype.element_ty),
                mask=(member < models)[:, None] & here[None, :],
            )
        leaves = tl.sum(tl.where(member < models, independent, 0.0), 0)
        loss = (1 - alpha) * leaves + alpha * temperature * temperature * distilled
        known = (right >= 0) & (
            right < classes
        )  # NaN for a target out of range, as an error would have to wait for the GPU
        tl.store(losses + sample, tl.where(known, loss, float("nan")))


@triton.jit
def _log_softmax(values, size, temperature, which, highest, total):
    """Log softmax of the ensemble whose maximum and sum are at ``which``."""
    top = tl.sum(tl.where(which, highest, 0.0), 0)
    return _prefix(values, size, temperature) - top - tl.log(tl.sum(tl.where(which, total, 0.0), 0))


# A block of classes needs registers for [models, BLOCK] values, their softmax and gradient.
_KERNELS = {block: Kernel(_kernel, [config(4, BLOCK=block)], []) for block in (16, 32, 64, 128)}
_KERNELS[512] = Kernel(_kernel, [config(8, BLOCK=512)], [])


def _block(models: int, classes: int) -> int:
    """Classes per block; ``models`` is a power of two."""
    if models > 16:
        return max(2048 // models, 16)
    return 128 if classes <= 128 else 512


@op
def hierarchical_distillation_loss(
    logits: Tensor, target: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """See :func:`hne_kernels.hierarchical_distillation_loss`; returns the loss and its gradient.

    A class index out of range gives a loss of NaN, and is not used to read memory.
    """
    check(logits, target, alpha, temperature)
    models, batch, classes = logits.shape
    losses = logits.new_empty(batch, dtype=torch.float32)
    grad = logits.new_empty(logits.shape)
    students = (models - 1).bit_length()  # the powers of two below the number of models
    padded = max(1 << students, 1)
    _KERNELS[_block(padded, classes)](
        logits.contiguous(), target.contiguous(), losses, grad, models, batch, classes, alpha, temperature,
        STUDENTS=students, MODELS=padded,
    )  # fmt: skip
    return losses.mean().to(logits.dtype), grad


differentiate("triton_hierarchical_distillation_loss")
