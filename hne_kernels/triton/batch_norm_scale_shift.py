"""The normalisation of a batch norm and its running statistics in one launch; the gradients in another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.batch_norm_scale_shift import check, check_backward, differentiate, parameter_gradients
from .launch import SIZES, Kernel, config, op


@triton.jit
def _interpolate(running, batch, momentum):
    """``running + momentum * (batch - running)``, from the nearer end as in torch.lerp."""
    return tl.where(
        tl.abs(momentum) < 0.5, running + momentum * (batch - running), batch - (batch - running) * (1 - momentum)
    )


@triton.jit(do_not_specialize=[*SIZES, "weight_stride", "bias_stride", "mean_stride", "var_stride"])
def _kernel(
    mean, var, weight, bias, running_mean, running_var, num_batches_tracked, total, norm, branches, channels,
    weight_branch, weight_stride, bias_branch, bias_stride, mean_branch, mean_stride, var_branch, var_stride,
    unbiased, momentum, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows mean, scale and shift of ``norm``; updates the running statistics and the number of batches."""
    values = branches * channels
    if num_batches_tracked is not None:
        first = tl.program_id(0) == 0
        tl.store(num_batches_tracked, tl.load(num_batches_tracked, mask=first, other=0) + 1, mask=first)
    factor = unbiased
    if total is not None:
        number = tl.load(total)
        factor = number / (number - 1)
    for tile in range(tl.program_id(0), tl.cdiv(values, BLOCK), tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        mask = at < values
        branch, c = (at // channels).to(tl.int64), (at % channels).to(tl.int64)
        m = tl.load(mean + at, mask=mask, other=0.0)
        v = tl.load(var + at, mask=mask, other=1.0)
        scale = 1 / tl.sqrt(v + eps)
        if weight is not None:
            scale *= tl.load(weight + branch * weight_branch + c * weight_stride, mask=mask, other=0.0).to(tl.float32)
        shift = tl.zeros((BLOCK,), tl.float32)
        if bias is not None:
            shift += tl.load(bias + branch * bias_branch + c * bias_stride, mask=mask, other=0.0).to(tl.float32)
        tl.store(norm + at, m, mask=mask)
        tl.store(norm + values + at, scale, mask=mask)
        tl.store(norm + 2 * values + at, shift, mask=mask)
        if running_mean is not None:
            to_mean = running_mean + branch * mean_branch + c * mean_stride
            to_var = running_var + branch * var_branch + c * var_stride
            new = _interpolate(tl.load(to_mean, mask=mask, other=0.0).to(tl.float32), m, momentum)
            tl.store(to_mean, new.to(running_mean.dtype.element_ty), mask=mask)
            new = _interpolate(tl.load(to_var, mask=mask, other=0.0).to(tl.float32), v * factor, momentum)
            tl.store(to_var, new.to(running_var.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "weight_stride"])
def _backward_kernel(
    grad, var, weight, grad_mean, grad_var, grad_weight, grad_bias, branches, channels, weight_branch, weight_stride,
    eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of mean, var, weight and bias."""
    values = branches * channels
    for tile in range(tl.program_id(0), tl.cdiv(values, BLOCK), tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        mask = at < values
        inverse = 1 / tl.sqrt(tl.load(var + at, mask=mask, other=1.0) + eps)
        of_scale = tl.load(grad + values + at, mask=mask, other=0.0)
        tl.store(grad_mean + at, tl.load(grad + at, mask=mask, other=0.0), mask=mask)
        of_var = -0.5 * of_scale * (inverse * inverse * inverse)
        if weight is not None:
            branch, c = (at // channels).to(tl.int64), (at % channels).to(tl.int64)
            of_var *= tl.load(weight + branch * weight_branch + c * weight_stride, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_weight + at, (of_scale * inverse).to(grad_weight.dtype.element_ty), mask=mask)
        tl.store(grad_var + at, of_var, mask=mask)
        if grad_bias is not None:
            shift = tl.load(grad + 2 * values + at, mask=mask, other=0.0)
            tl.store(grad_bias + at, shift.to(grad_bias.dtype.element_ty), mask=mask)


_CONFIGS = [config(4, BLOCK=128)]  # one only: tuning would update the running statistics several times
_scale_shift = Kernel(_kernel, _CONFIGS, [])
_backward = Kernel(_backward_kernel, _CONFIGS, [])


def _strides(tensor: Tensor | None, channels: int) -> tuple[int, int]:
    """Distances in memory of branches and of channels of a tensor ``[G, C]`` or ``[G * C]``."""
    if tensor is None:
        return 0, 0
    strides = tensor.stride()
    return (strides[0], strides[1]) if len(strides) == 2 else (channels * strides[0], strides[0])


def _check_written(name: str, tensor: Tensor | None) -> None:
    """Raise if values that the kernel writes share memory."""
    if tensor is not None and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(f"{name}: expected a place in memory for each value, got strides {tensor.stride()}")


@op(mutates_args=("running_mean", "running_var", "num_batches_tracked"))
def batch_norm_scale_shift(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    total: Tensor | None,
    count: int,
    momentum: float,
    eps: float,
) -> Tensor:
    """See :func:`hne_kernels.batch_norm_scale_shift`."""
    check(mean, var, weight, bias, running_mean, running_var, num_batches_tracked, total, count, momentum, eps)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _check_written(name, tensor)
    if total is None and count < 2:  # fewer values have no variance
        running_mean = running_var = None
    branches, channels = mean.shape
    norm = mean.new_empty(3, branches, channels)
    strides = [_strides(tensor, channels) for tensor in (weight, bias, running_mean, running_var)]
    _scale_shift(
        mean.contiguous(), var.contiguous(), weight, bias, running_mean, running_var, num_batches_tracked, total, norm,
        branches, channels, *(stride for pair in strides for stride in pair),
        count / max(count - 1, 1), momentum, eps,
    )  # fmt: skip
    return norm


@op
def batch_norm_scale_shift_backward(
    grad: Tensor, var: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of mean, var, weight and bias of :func:`batch_norm_scale_shift`, empty where absent."""
    check_backward(grad, var, weight)
    branches, channels = var.shape
    grad_mean, grad_var = var.new_empty(var.shape), var.new_empty(var.shape)
    grad_weight, grad_bias = parameter_gradients(var, weight, has_bias)
    _backward(
        grad.contiguous(), var.contiguous(), weight, grad_mean, grad_var,
        None if weight is None else grad_weight, grad_bias if has_bias else None, branches, channels,
        *_strides(weight, channels), eps,
    )  # fmt: skip
    return grad_mean, grad_var, grad_weight, grad_bias


differentiate("triton_batch_norm_scale_shift")
