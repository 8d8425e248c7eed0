"""What batch norm needs besides the op: the running statistics, and statistics over all
processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .modules import Unit


def count_batch(unit: Unit) -> float:
    """Count a batch, and return the weight of its statistics in the running ones."""
    tracked = _present(unit.bn.num_batches_tracked)
    tracked.add_(1)
    return 1.0 / float(tracked) if unit.bn.momentum is None else unit.bn.momentum


def update_running(unit: Unit, branches: slice, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Move the running statistics of some branches towards those of a batch, as ``nn.BatchNorm2d`` does.

    Args:
        mean, var: ``[branches, channels]``, the variance biased.
        count: Values that each of them is taken over.
    """
    weight = count_batch(unit)
    if not isinstance(count, Tensor) and count == 0:
        return  # an empty batch tells nothing
    unbiased = var * (count / (count - 1))
    with torch.no_grad():
        for running, batch in ((unit.bn.running_mean, mean), (unit.bn.running_var, unbiased)):
            running = _present(running)
            unit.part(running, branches).lerp_(batch.to(running.dtype), weight)


def of_batch(unit: Unit, branches: slice, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The statistics to normalise by, in training; the running ones are updated.

    Args:
        mean, var: Of this process's part of the batch, ``[branches, channels]``, the variance biased.
        count: Values that each of them is taken over.

    Raises:
        ValueError: There is only one value per channel.
    """
    total: int | Tensor = count
    if is_synchronised(unit):
        mean, var, total = _of_all_processes(mean, var, count)
    elif count == 1:
        raise ValueError("batch norm: expected more than 1 value per channel when training, got 1")
    update_running(unit, branches, mean.detach(), var.detach(), total)
    return mean, var


def running(unit: Unit, branches: slice) -> tuple[Tensor, Tensor]:
    """The running mean and variance ``[branches, channels]``, in float32 at least."""
    bn = unit.bn
    mean, var = (unit.part(_present(t), branches) for t in (bn.running_mean, bn.running_var))
    return _wide(mean), _wide(var)


def scale_and_shift(unit: Unit, branches: slice, var: Tensor) -> tuple[Tensor, Tensor]:
    """Batch norm is ``(x - mean) * scale + shift``, each ``[branches, channels]``, in float32 at least."""
    weight, bias = (_wide(unit.part(t, branches)) for t in (unit.bn.weight, unit.bn.bias))
    return weight * (var + unit.bn.eps).rsqrt(), bias


def is_synchronised(unit: Unit) -> bool:
    """Whether the batch statistics of ``unit`` are to be taken over several processes."""
    return (
        unit.synchronised
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _of_all_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over the batches of all processes.

    Two sums are exchanged, the second one of squared distances from the common mean: a variance
    that does not cancel.
    """
    sums = _AllReduce.apply(torch.cat([(mean * count).flatten(), mean.new_full((1,), count)]))
    total = sums[-1].detach()
    common = sums[:-1].view_as(mean) / total
    squares = _AllReduce.apply((var + (mean - common).square()) * count)
    return common, squares / total, total


class _AllReduce(torch.autograd.Function):
    """Sum over all processes. So is the gradient, each process having a loss of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _present(buffer: Tensor | None) -> Tensor:
    """The running statistics are always there: ``Unit`` makes its batch norm with them."""
    assert buffer is not None
    return buffer
