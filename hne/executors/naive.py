"""Computes layers in plain PyTorch, as in the paper's Figure 2: the channels of all branches side by side, grouped
convolutions, and features copied where the tree branches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import (
    ACTIVATIONS,
    BranchLinear,
    BranchModule,
    ConvNorm,
    batch_normalization,
    count_batch,
    is_synchronised,
)
from .base import SubtreeExecutor


class NaiveExecutor(SubtreeExecutor):
    """Features are ``[batch, branches * channels, height, width]``."""

    def from_images(self, images: Tensor) -> Tensor:
        return images

    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(0, samples)

    def conv_norm(
        self,
        module: ConvNorm,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        (weight,) = _grouped(module, branches, module.conv.weight)
        if module.depthwise:
            x = self.replicate(x, branches, replicate, module.in_channels)
            x = F.conv2d(x, weight, None, module.stride, module.padding, groups=len(weight))
        else:
            x = self.convolve(x, weight, None, module.stride, module.padding, branches.stop - branches.start, replicate)
        x = _batch_norm(module, x, branches)
        return ACTIVATIONS[activation](x if residual is None else x + residual)

    def linear(
        self, module: BranchLinear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        weight, bias = _grouped(module, branches, module.conv.weight, module.conv.bias)
        return ACTIVATIONS[activation](self.convolve(x, weight, bias, 1, 0, branches.stop - branches.start, replicate))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
    ) -> Tensor:
        """Replicate the features, then apply a grouped convolution with ``branches`` output branches."""
        x = self.replicate(x, slice(0, branches), replicate, weight.shape[1])
        return F.conv2d(x, weight, bias, stride, padding, groups=branches)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def replicate(self, x: Tensor, branches: slice, replicate: int, channels: int) -> Tensor:
        if replicate == 1:
            return x
        children = x.unflatten(1, (-1, channels)).repeat_interleave(replicate, 1)
        return children[:, : branches.stop - branches.start].flatten(1, 2)

    def logits(self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        y = self.linear(head, x, leaves, replicate)
        return y.flatten(1).unflatten(1, (-1, head.channels)).transpose(0, 1)

    def prefix_logits(
        self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]
    ) -> Tensor:
        logits = self.logits(head, x, leaves, replicate)
        return torch.stack([logits[:size].mean(0) for size in sizes])


def _grouped(module: BranchModule, branches: slice, *tensors: Tensor | None) -> list[Tensor]:
    """The wanted branches of each tensor, in the layout of a grouped convolution."""
    return [module.select_branches(t, branches).flatten(0, 1) for t in tensors if t is not None]


def _batch_norm(module: ConvNorm, x: Tensor, branches: slice) -> Tensor:
    bn = module.bn
    if bn.training and is_synchronised(module):
        y = x.unflatten(1, (-1, module.channels)).transpose(0, 1)  # [branches, batch, channels, height, width]
        rows = y.transpose(2, 1).flatten(2)
        mean, var = rows.mean(2), rows.var(2, correction=0)
        if rows.shape[2] == 0:  # this process has no samples
            mean = var = rows.sum(2)
        norm = batch_normalization(module, branches, mean, var, rows.shape[2])
        mean, scale, shift = norm[:, :, None, :, None, None]
        return ((y - mean) * scale + shift).to(y.dtype).transpose(0, 1).flatten(1, 2)
    mean, var, weight, bias = _grouped(module, branches, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    momentum = count_batch(module) if bn.training else 0.0
    return F.batch_norm(x, mean, var, weight, bias, bn.training, momentum, bn.eps)
