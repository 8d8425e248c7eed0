"""What batch norm needs besides the op: the running statistics, and statistics over all
processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from .layers import Unit


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


def affine(unit: Unit) -> tuple[Tensor, Tensor]:
    """Batch norm by the running statistics as ``x * scale + shift``, ``[branches * channels]`` each.

    In float32 at least, whatever the parameters' dtype.
    """
    bn = unit.bn
    dtype = torch.promote_types(bn.weight.dtype, torch.float32)
    mean, var = (_present(running).to(dtype) for running in (bn.running_mean, bn.running_var))
    scale = bn.weight.to(dtype) * (var + bn.eps).rsqrt()
    return scale, bn.bias.to(dtype) - mean * scale


def is_synchronised(unit: Unit) -> bool:
    """Whether the batch statistics of ``unit`` are to be taken over several processes."""
    return (
        unit.synchronised
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def global_batch_norm(unit: Unit, x: Tensor, branches: slice) -> Tensor:
    """Normalise ``x`` ``[branches, batch, height, width, channels]`` by the statistics of the
    batches of all processes, and update the running ones.

    Two sums are exchanged, the second one of squared distances from the common mean: a variance
    that does not cancel.
    """
    wide = x.to(torch.promote_types(x.dtype, unit.bn.weight.dtype))
    total = wide.sum((1, 2, 3))
    values = total.new_full((1,), x.shape[1:4].numel())
    sums = _AllReduce.apply(torch.cat([total.flatten(), values]))
    count = sums[-1].detach()
    mean = sums[:-1].view_as(total) / count
    centred = wide - _over_map(mean)
    var = _AllReduce.apply(centred.square().sum((1, 2, 3))) / count
    update_running(unit, branches, mean, var, count)
    weight, bias = (unit.part(p, branches) for p in (unit.bn.weight, unit.bn.bias))
    y = centred * _over_map((var + unit.bn.eps).rsqrt() * weight) + _over_map(bias)
    return y.to(x.dtype)


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


def _over_map(statistics: Tensor) -> Tensor:
    """``[branches, channels]`` to where it broadcasts over batch, height and width."""
    return statistics[:, None, None, None]


def _present(buffer: Tensor | None) -> Tensor:
    """The running statistics are always there: ``Unit`` makes its batch norm with them."""
    assert buffer is not None
    return buffer
