"""Batch norms of all branches: running statistics, statistics over all processes, and the normalisation tensor.

The kernels take a normalisation as one tensor ``[3, branches, channels]`` with the rows mean, scale and shift:
``batch_norm(x) = (x - mean) * scale + shift``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

import hne_kernels as K

from .parameters import BatchNormModule
from .submodules import prepare_to_read


def uses_batch_statistics(module: BatchNormModule) -> bool:
    """Whether the batch norm normalises by the statistics of the batch: in training, or without running statistics.

    Raises:
        SkippedModuleError: ``bn`` was replaced by another kind of module, or has hooks.
    """
    bn = module.bn
    prepare_to_read(bn, nn.BatchNorm2d, nn.SyncBatchNorm)
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def batch_normalization(module: BatchNormModule, branches: slice, mean: Tensor, var: Tensor, count: int) -> Tensor:
    """The normalisation ``[3, branches, channels]`` by the statistics of a batch; updates the running statistics.

    Args:
        module: A module whose batch norm uses batch statistics (:func:`uses_batch_statistics`).
        branches: The branches that were computed.
        mean, var: Mean and biased variance of this process's batch, ``[branches, channels]``.
        count: Number of values per channel in this process.

    Raises:
        ValueError: There is only one value per channel, in all processes together if they are synchronised.
    """
    total = None
    if is_synchronised(module):
        mean, var, count, total = _statistics_of_all_processes(_wide(mean), _wide(var), count, _process_group(module))
    # torch.jit.trace has a tensor in place of a number, and would make the comparison a constant.
    if total is None and not isinstance(count, Tensor) and count == 1:
        raise ValueError("batch norm: expected more than 1 value per channel when training, got 1")
    bn = module.bn
    running_mean = running_var = batches = None
    momentum = 0.0
    if bn.training and bn.track_running_stats:
        if bn.momentum is None:  # a cumulative average, whose weight depends on the number of batches
            momentum = count_batch(module)
        else:
            momentum, batches = bn.momentum, bn.num_batches_tracked
        running_mean, running_var = bn.running_mean, bn.running_var
        if running_mean is None or running_var is None:
            running_mean = running_var = None
    return K.batch_norm_scale_shift(
        mean,
        var,
        _select(module, bn.weight, branches),
        _select(module, bn.bias, branches),
        _select(module, running_mean, branches),
        _select(module, running_var, branches),
        batches,
        total,
        count=count,
        momentum=momentum,
        eps=bn.eps,
    )


def running_normalization(module: BatchNormModule, branches: slice) -> Tensor:
    """The normalisation ``[3, branches, channels]`` by the running statistics."""
    bn = module.bn
    assert bn.running_mean is not None
    assert bn.running_var is not None
    mean, var = (module.select_branches(t, branches) for t in (bn.running_mean, bn.running_var))
    mean, scale = _wide(mean), (_wide(var) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = _wide(module.select_branches(bn.weight, branches)) * scale
    shift = torch.zeros_like(scale) if bn.bias is None else _wide(module.select_branches(bn.bias, branches))
    return torch.stack([mean, scale, shift])


def count_batch(module: BatchNormModule) -> float:
    """Count a batch; return the weight of its statistics in the update of the running statistics."""
    bn = module.bn
    if not bn.track_running_stats or bn.num_batches_tracked is None:
        return bn.momentum or 0.0
    bn.num_batches_tracked.add_(1)
    return 1.0 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum


def is_synchronised(module: BatchNormModule) -> bool:
    """Whether the batch statistics of ``module`` are computed over several processes.

    They are so in training after :meth:`HNE.sync_batch_norm_` or ``nn.SyncBatchNorm.convert_sync_batchnorm``.
    """
    bn = module.bn
    return (
        (module.synchronised or isinstance(bn, nn.SyncBatchNorm))
        and bn.training
        and isinstance(bn, nn.modules.batchnorm._BatchNorm)
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size(_process_group(module)) > 1
    )


def _process_group(module: BatchNormModule) -> Any:
    """The processes that share their batch statistics; None for all."""
    return module.bn.process_group if isinstance(module.bn, nn.SyncBatchNorm) else None


def _select(module: BatchNormModule, tensor: Tensor | None, branches: slice) -> Tensor | None:
    """The part of a parameter or buffer ``[all branches * channels]`` that belongs to some branches."""
    if tensor is None or branches == slice(0, module.branches):
        return tensor
    return tensor[branches.start * module.channels : branches.stop * module.channels]


def _statistics_of_all_processes(
    mean: Tensor, var: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Mean, variance and count over the batches of the processes of ``group``.

    Two sums are exchanged; the second is of squared distances from the common mean, so the variance does not cancel.
    The last result is the count as a tensor, which replaces the number; None if the count is below 2. A number would
    have to be copied from the GPU.
    """
    sums = _AllReduce.apply(torch.cat([(mean * count).flatten(), mean.new_full((1,), count)]), group)
    total = sums[-1].detach()
    if count <= 1:
        number = int(total.item())
        if number <= 1:  # then all processes return here
            return mean, var, number, None
    common = sums[:-1].view_as(mean) / total
    squares = _AllReduce.apply((var + (mean - common).square()) * count, group)
    return common, squares / total, count, total


class _AllReduce(torch.autograd.Function):
    """Sum over the processes of a group. The losses of all processes depend on the sum, so their gradients are summed,
    too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad, ctx.group), None


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
