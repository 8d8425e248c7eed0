"""Batch norm from the statistics of a batch: mean, scale and shift of a feature map, and the running statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks, dispatch
from .normalization import PER_CHANNEL

_STATISTICS = (torch.float32, torch.float64)


def batch_norm_scale_shift(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    total: Tensor | None = None,
    *,
    count: int,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The normalisation of a batch norm: ``scale = weight / sqrt(var + eps)`` and ``shift = bias``, for each branch.

    In the same pass, the running statistics move towards those of the batch (Ioffe & Szegedy 2015), in place:
    ``running_mean += momentum * (mean - running_mean)``, and ``running_var`` likewise towards the unbiased variance
    ``var * count / (count - 1)``. They stay unchanged where there are fewer than two values per channel.

    Args:
        mean, var: mean and biased variance of a batch, ``[G, C]``, float32 or float64.
        weight, bias: parameters ``[G, C]``, or ``[G * C]`` as ``nn.BatchNorm2d`` has them, any strides, floating-point
            of a dtype not wider than ``mean``; equal shapes and dtypes. None for 1 and 0.
        running_mean, running_var: running statistics, layouts and dtypes as for ``weight``; changed in place. None
            where there are none.
        num_batches_tracked: one int64, which is increased by 1; or None.
        total: number of values per channel as a tensor of one number, dtype of ``mean``, above 1; for a number that
            only the device knows. It replaces ``count``.
        count: number of values per channel.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        ``[3, G, C]``, the rows mean, scale and shift, dtype of ``mean``; differentiable any number of times, with
        respect to mean, var, weight and bias.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    if isinstance(count, Tensor) and torch._C._get_tracing_state() is not None:
        # torch.jit.trace has tensors in place of sizes; as a number, the size would be a constant of the program.
        total, count = count.to(mean) if total is None else total, 0
    arguments = (
        *(mean, var, weight, bias, running_mean, running_var, num_batches_tracked, total),
        *(count, momentum, eps),
    )
    checked = torch.compiler.is_compiling()  # shape inference checks
    try:
        op = dispatch.implementation("batch_norm_scale_shift", mean)
        if not checked and (isinstance(count, bool) or not isinstance(op, torch._ops.OpOverloadPacket)):
            checked = True
            check(*arguments)
        norm: Tensor = op(*arguments)
    except Exception:
        if not checked:
            check(*arguments)  # the registered ops check faster; this one says more
        raise
    return norm


def check(
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
) -> None:
    """Check the arguments of :func:`batch_norm_scale_shift`."""
    checks.rank("mean", mean, 2, PER_CHANNEL)
    if mean.dtype not in _STATISTICS:
        raise TypeError(f"mean: expected torch.float32 or torch.float64, got {mean.dtype}")
    checks.shape("var", var, mean.shape, PER_CHANNEL)
    _check_kind("var", var, mean)
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if tensor is not None:
            _check_parameter(name, tensor, mean)
    if weight is not None and bias is not None and (weight.shape != bias.shape or weight.dtype != bias.dtype):
        raise ValueError(
            f"bias: expected shape and dtype of weight, {tuple(weight.shape)} and {weight.dtype}, "
            f"got {tuple(bias.shape)} and {bias.dtype}"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean: expected both running_mean and running_var, or neither")
    if num_batches_tracked is not None:
        _check_number("num_batches_tracked", num_batches_tracked, mean, torch.int64)
    if total is not None:
        _check_number("total", total, mean, mean.dtype)
    checks.at_least("count", count, 0)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if momentum != momentum:
        raise ValueError(f"momentum: expected a number, got {momentum}")


def _check_kind(name: str, tensor: Tensor, mean: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless ``tensor`` has the device of ``mean`` and the dtype, that of ``mean`` if None."""
    if tensor.device != mean.device:
        raise ValueError(f"{name}: expected to be on the device of mean, {mean.device}, got {tensor.device}")
    if tensor.dtype != (dtype or mean.dtype):
        raise TypeError(f"{name}: expected {dtype or mean.dtype}, got {tensor.dtype}")


def _check_parameter(name: str, tensor: Tensor, mean: Tensor) -> None:
    """Raise unless ``tensor`` has a value for each value of ``mean``, in a dtype that is not wider."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {PER_CHANNEL}, got {type(tensor).__name__}")
    shape = mean.shape
    if tensor.shape != shape and (tensor.dim() != 1 or tensor.shape[0] != shape[0] * shape[1]):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} {PER_CHANNEL} or ({shape[0] * shape[1]},), "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != mean.device:
        raise ValueError(f"{name}: expected to be on the device of mean, {mean.device}, got {tensor.device}")
    if tensor.dtype != mean.dtype and not (tensor.is_floating_point() and tensor.dtype.itemsize < mean.dtype.itemsize):
        raise TypeError(f"{name}: expected {mean.dtype} or a narrower floating-point dtype, got {tensor.dtype}")


def _check_number(name: str, tensor: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``tensor`` is one number of this dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of one number, got {type(tensor).__name__}")
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {tuple(tensor.shape)}")
    _check_kind(name, tensor, mean, dtype)


def check_backward(grad: Tensor, var: Tensor, weight: Tensor | None) -> None:
    """Check the arguments of the gradient of :func:`batch_norm_scale_shift`."""
    checks.rank("var", var, 2, PER_CHANNEL)
    checks.shape("grad", grad, (3, *var.shape), "[3, branches, channels]")
    _check_kind("grad", grad, var)
    if weight is not None:
        _check_parameter("weight", weight, var)


def parameter_gradients(var: Tensor, weight: Tensor | None, has_bias: bool) -> tuple[Tensor, Tensor]:
    """New tensors for the gradients of weight and bias, empty for an absent parameter."""
    like = var if weight is None else weight
    return like.new_empty(0 if weight is None else like.shape), like.new_empty(like.shape if has_bias else 0)


@torch.library.register_fake("hne::batch_norm_scale_shift")
def _(mean: Tensor, *rest: Any) -> Tensor:
    check(mean, *rest)
    return mean.new_empty(3, *mean.shape)


@torch.library.register_fake("hne::batch_norm_scale_shift_backward")
def _(
    grad: Tensor, var: Tensor, weight: Tensor | None, has_bias: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_backward(grad, var, weight)
    return var.new_empty(var.shape), var.new_empty(var.shape), *parameter_gradients(var, weight, has_bias)


def differentiate(op: str) -> None:
    """Register autograd of ``op``, whose gradient is the op ``op_backward``, and of that one."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, var, weight, bias, *_, ctx.eps = inputs
        # Without a weight, the gradient of the bias has the layout of the statistics.
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(var, weight)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        var, weight = ctx.saved_tensors
        of_mean, of_var, of_weight, of_bias = autograd.call(
            backward_op, grad, var, weight, ctx.bias is not None, ctx.eps
        )
        if weight is None:
            of_weight = None
            if ctx.bias is not None:
                shape, dtype = ctx.bias
                of_bias = of_bias.view(shape).to(dtype)
        return of_mean, of_var, of_weight, None if ctx.bias is None else of_bias, *(None,) * 7

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, var, weight, ctx.has_bias, ctx.eps = inputs
        ctx.save_for_backward(grad, var, weight)

    autograd.register_mutable(op, backward, setup)
    autograd.register(f"{op}_backward", _double_backward, setup_backward)


def _double_backward(
    ctx: Any, of_mean: Tensor, of_var: Tensor, of_weight: Tensor, of_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient of the backward op in plain PyTorch: it is rarely needed, and differentiable again this way.

    The backward op computes, with r = 1 / sqrt(var + eps) and the rows of grad: ``grad[0]`` for the mean,
    ``-grad[1] * weight * r^3 / 2`` for the variance, ``grad[1] * r`` for the weight and ``grad[2]`` for the bias. The
    arguments are the gradients of these.
    """
    grad, var, weight = ctx.saved_tensors
    inverse = (var + ctx.eps).rsqrt()
    cube = inverse.pow(3) / -2
    wide = torch.ones_like(var) if weight is None else weight.view(var.shape).to(var.dtype)
    along = of_var * grad[1]
    of_scale, grad_inverse, grad_weight = of_var * wide * cube, along * wide * inverse.square() * -1.5, None
    if weight is not None:
        of_weight = of_weight.view(var.shape).to(var.dtype)
        of_scale = of_scale + of_weight * inverse
        grad_inverse = grad_inverse + of_weight * grad[1]
        grad_weight = (along * cube).view(weight.shape).to(weight.dtype)
    of_shift = of_bias.view(var.shape).to(var.dtype) if ctx.has_bias else torch.zeros_like(var)
    return torch.stack([of_mean, of_scale, of_shift]), grad_inverse * cube, grad_weight, None, None


differentiate("batch_norm_scale_shift")
