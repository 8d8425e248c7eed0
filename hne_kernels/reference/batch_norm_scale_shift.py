"""The normalisation of a batch norm and its running statistics, each by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if num_batches_tracked is not None:
        with torch.no_grad():
            num_batches_tracked.add_(1)
    number = count if total is None else total.detach()
    if running_mean is not None and running_var is not None and (total is not None or count > 1):
        unbiased = var.detach() * (number / (number - 1))
        with torch.no_grad():
            for running, batch in ((running_mean, mean.detach()), (running_var, unbiased)):
                running.view(mean.shape).lerp_(batch.to(running.dtype), momentum)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight.view(mean.shape).to(mean.dtype) * scale
    shift = torch.zeros_like(scale) if bias is None else bias.view(mean.shape).to(mean.dtype)
    return torch.stack([mean, scale, shift])
