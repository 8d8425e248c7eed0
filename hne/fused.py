"""Execution by the kernels: branch-major features, and no replication in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import hne_kernels as K

from . import batch_norm
from .layers import ACTIVATIONS, Layer, Linear, Unit


class Fused:
    """Features are ``[branches, batch, height, width, channels]``. Differentiable: for training,
    and wherever gradients are wanted.
    """

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        return (images,)

    def enter(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1)[None]

    def layer(self, layer: Layer, x: Tensor, branches: slice, replicate: int) -> Tensor:
        y: Tensor = layer(self, x, branches, replicate)
        return y

    def unit(
        self,
        unit: Unit,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        weight = unit.part(unit.conv.weight, branches)
        if unit.depthwise:
            y = K.branch_depthwise_conv2d(
                x, weight.squeeze(2), stride=unit.stride, padding=unit.padding, replicate=replicate
            )
        else:
            y = K.branch_conv2d(x, weight, stride=unit.stride, padding=unit.padding, replicate=replicate)
        if not unit.bn.training:
            scale, shift = (unit.part(t, branches)[:, None, None, None] for t in batch_norm.affine(unit))
            y = (y * scale + shift).to(y.dtype)
        elif batch_norm.is_synchronised(unit):
            y = batch_norm.global_batch_norm(unit, y, branches)
        else:
            weight, bias = (unit.part(p, branches) for p in (unit.bn.weight, unit.bn.bias))
            y, mean, var = K.branch_batch_norm(
                y, weight, bias, residual=residual, activation=activation, eps=unit.bn.eps
            )
            batch_norm.update_running(unit, branches, mean, var, y.shape[1:4].numel())
            return y
        return ACTIVATIONS[activation](y if residual is None else y + residual)

    def linear(
        self, linear: Linear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        weight, bias = linear_parameters(linear, branches)
        return ACTIVATIONS[activation](K.branch_conv2d(x, weight, bias, replicate=replicate))

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def replicate(self, x: Tensor, branches: slice, replicate: int, channels: int) -> Tensor:
        if replicate == 1:
            return x
        return x.repeat_interleave(replicate, 0)[: branches.stop - branches.start]

    def logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        return self.linear(head, self.pool(x), leaves, replicate).flatten(2)

    def prefix_logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]) -> Tensor:
        features = self.replicate(self.pool(x).flatten(2), leaves, replicate, head.in_channels)
        weight, bias = linear_parameters(head, leaves)
        return K.prefix_logits(features, weight[..., 0, 0], bias, sizes)[1]


def linear_parameters(linear: Linear, branches: slice) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, in_channels, 1, 1]`` and bias ``[branches, channels]``."""
    assert linear.conv.bias is not None
    return linear.part(linear.conv.weight, branches), linear.part(linear.conv.bias, branches)
