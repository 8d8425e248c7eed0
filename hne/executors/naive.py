"""Execution in plain PyTorch, as in the paper's Figure 2: the channels of all branches side by
side, features copied where the tree branches, grouped convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import batch_norm
from ..layers.modules import ACTIVATIONS, Branched, Execution, Layer, Linear, Unit


class Naive(Execution):
    """Features are ``[batch, branches * channels, height, width]``."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        return (images,)

    def enter(self, image: Tensor) -> Tensor:
        return image

    def select(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(0, samples)

    def block(self, layers: Sequence[Layer], x: Tensor, branches: slice, replicate: int) -> Tensor:
        for layer in layers:
            x = layer(self, x, branches, replicate)
            replicate = 1  # only the first layer branches
        return x

    def unit(
        self,
        unit: Unit,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        (weight,) = _parts(unit, branches, unit.conv.weight)
        if unit.depthwise:
            x = self.replicate(x, branches, replicate, unit.in_channels)
            x = F.conv2d(x, weight, None, unit.stride, unit.padding, groups=len(weight))
        else:
            x = self.convolve(x, weight, None, unit.stride, unit.padding, branches.stop - branches.start, replicate)
        x = _batch_norm(unit, x, branches)
        return ACTIVATIONS[activation](x if residual is None else x + residual)

    def linear(
        self, linear: Linear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        weight, bias = _parts(linear, branches, linear.conv.weight, linear.conv.bias)
        return ACTIVATIONS[activation](self.convolve(x, weight, bias, 1, 0, branches.stop - branches.start, replicate))

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
    ) -> Tensor:
        """The convolutions of ``branches`` of which ``replicate`` share a parent; the last may share with fewer."""
        x = self.replicate(x, slice(0, branches), replicate, weight.shape[1])
        return F.conv2d(x, weight, bias, stride, padding, groups=branches)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def replicate(self, x: Tensor, branches: slice, replicate: int, channels: int) -> Tensor:
        if replicate == 1:
            return x
        children = x.unflatten(1, (-1, channels)).repeat_interleave(replicate, 1)
        return children[:, : branches.stop - branches.start].flatten(1, 2)

    def logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        y = self.linear(head, self.pool(x), leaves, replicate)
        return y.flatten(1).unflatten(1, (-1, head.channels)).transpose(0, 1)

    def prefix_logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]) -> Tensor:
        logits = self.logits(head, x, leaves, replicate)
        return torch.stack([logits[:size].mean(0) for size in sizes])


def _parts(module: Branched, branches: slice, *tensors: Tensor | None) -> list[Tensor]:
    """The wanted branches of each tensor, side by side."""
    return [module.part(t, branches).flatten(0, 1) for t in tensors if t is not None]


def _batch_norm(unit: Unit, x: Tensor, branches: slice) -> Tensor:
    bn = unit.bn
    if bn.training and batch_norm.is_synchronised(unit):
        y = x.unflatten(1, (-1, unit.channels)).transpose(0, 1)  # [branches, batch, channels, height, width]
        rows = y.transpose(2, 1).flatten(2)
        mean, var = rows.mean(2), rows.var(2, correction=0)
        if rows.shape[2] == 0:  # this process has none of the batch
            mean = var = rows.sum(2)
        mean, var = batch_norm.of_batch(unit, branches, mean, var, rows.shape[2])
        scale, shift = batch_norm.scale_and_shift(unit, branches, var)
        mean, scale, shift = (vector[:, None, :, None, None] for vector in (mean, scale, shift))
        return ((y - mean) * scale + shift).to(y.dtype).transpose(0, 1).flatten(1, 2)
    mean, var, weight, bias = _parts(unit, branches, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    momentum = batch_norm.count_batch(unit) if bn.training else 0.0
    return F.batch_norm(x, mean, var, weight, bias, bn.training, momentum, bn.eps)
