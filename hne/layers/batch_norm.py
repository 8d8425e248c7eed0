"""Batch norm of a :class:`ConvNorm`: running statistics, statistics over all processes, and the normalisation tensor.

The kernels take a normalisation as one tensor ``[3, branches, channels]`` with the rows mean, scale and shift:
``batch_norm(x) = (x - mean) * scale + shift``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .parameters import ConvNorm


def batch_normalization(module: ConvNorm, branches: slice, mean: Tensor, var: Tensor, count: int) -> Tensor:
    """The normalisation ``[3, branches, channels]`` by the statistics of a batch; updates the running statistics.

    Args:
        module: A convolution whose batch norm is in training mode.
        branches: The branches that were computed.
        mean, var: Mean and biased variance of this process's batch, ``[branches, channels]``.
        count: Number of values per channel in this process.

    Raises:
        ValueError: There is only one value per channel.
    """
    total: int | Tensor = count
    if is_synchronised(module):
        mean, var, total = _statistics_of_all_processes(mean, var, count)
    elif count == 1:
        raise ValueError("batch norm: expected more than 1 value per channel when training, got 1")
    _update_running_statistics(module, branches, mean.detach(), var.detach(), total)
    return _normalization(module, branches, mean, var)


def running_normalization(module: ConvNorm, branches: slice) -> Tensor:
    """The normalisation ``[3, branches, channels]`` by the running statistics."""
    bn = module.bn
    mean, var = (module.select_branches(_present(t), branches) for t in (bn.running_mean, bn.running_var))
    return _normalization(module, branches, _wide(mean), _wide(var))


def count_batch(module: ConvNorm) -> float:
    """Count a batch; return the weight of its statistics in the update of the running statistics."""
    tracked = _present(module.bn.num_batches_tracked)
    tracked.add_(1)
    return 1.0 / float(tracked) if module.bn.momentum is None else module.bn.momentum


def is_synchronised(module: ConvNorm) -> bool:
    """Whether the batch statistics of ``module`` are computed over several processes."""
    return (
        module.synchronised
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _normalization(module: ConvNorm, branches: slice, mean: Tensor, var: Tensor) -> Tensor:
    weight, bias = (_wide(module.select_branches(t, branches)) for t in (module.bn.weight, module.bn.bias))
    return torch.stack([mean, weight * (var + module.bn.eps).rsqrt(), bias])


def _update_running_statistics(
    module: ConvNorm, branches: slice, mean: Tensor, var: Tensor, count: int | Tensor
) -> None:
    """Move the running statistics towards those of a batch, as ``nn.BatchNorm2d`` does."""
    weight = count_batch(module)
    if not isinstance(count, Tensor) and count == 0:
        return  # an empty batch has no statistics
    unbiased = var * (count / (count - 1))
    with torch.no_grad():
        for running, batch in ((module.bn.running_mean, mean), (module.bn.running_var, unbiased)):
            running = _present(running)
            module.select_branches(running, branches).lerp_(batch.to(running.dtype), weight)


def _statistics_of_all_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over the batches of all processes.

    Two sums are exchanged; the second is of squared distances from the common mean, so the variance does not cancel.
    """
    sums = _AllReduce.apply(torch.cat([(mean * count).flatten(), mean.new_full((1,), count)]))
    total = sums[-1].detach()
    common = sums[:-1].view_as(mean) / total
    squares = _AllReduce.apply((var + (mean - common).square()) * count)
    return common, squares / total, total


class _AllReduce(torch.autograd.Function):
    """Sum over all processes. The losses of all processes depend on the sum, so their gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _present(buffer: Tensor | None) -> Tensor:
    """A buffer of the batch norm of a ``ConvNorm``, which always tracks running statistics."""
    assert buffer is not None
    return buffer
