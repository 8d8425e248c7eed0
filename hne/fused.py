"""Execution by the kernels: branch-major features, and no replication in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

import hne_kernels as K

from . import batch_norm
from .layers import ACTIVATIONS, Execution, Features, Layer, Linear, Unit


class Normalized(NamedTuple):
    """``activation((x - mean) * scale + shift)``: what a unit of a layer hands to the next, who normalises as it reads.

    Vectors are ``[branches, channels]``.
    """

    x: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    activation: str


class Fused(Execution):
    """Features are ``[branches, batch, height, width, channels]``; inside a layer they may be :class:`Normalized`.
    Differentiable: for training, and wherever gradients are wanted.
    """

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        return (images,)

    def enter(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1)[None]

    def select(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(1, samples)

    def layer(self, layer: Layer, x: Tensor, branches: slice, replicate: int) -> Tensor:
        return written(layer(self, x, branches, replicate))

    def unit(
        self,
        unit: Unit,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Features:
        weight = unit.part(unit.conv.weight, branches)
        weight = weight.squeeze(2) if unit.depthwise else weight
        geometry: dict[str, Any] = {"stride": unit.stride, "padding": unit.padding, "replicate": replicate}
        if unit.bn.training:
            convolve = K.branch_depthwise_conv2d_stats if unit.depthwise else K.branch_conv2d_stats
            y, mean, var = convolve(weight=weight, **_read(x), **geometry)
            mean, var = batch_norm.of_batch(unit, branches, mean, var, y.shape[1:4].numel())
        else:
            y = (K.branch_depthwise_conv2d if unit.depthwise else K.branch_conv2d)(written(x), weight, **geometry)
            mean, var = batch_norm.running(unit, branches)
        normalized = Normalized(y, mean, *batch_norm.scale_and_shift(unit, branches, var), activation)
        return normalized if residual is None else written(normalized, written(residual))

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


def written(x: Tensor | Normalized, residual: Tensor | None = None) -> Tensor:
    """The features as a tensor; ``residual`` is added before the activation."""
    if isinstance(x, Tensor):
        return x
    return K.branch_normalize(x.x, x.mean, x.scale, x.shift, residual=residual, activation=x.activation)


def _read(x: Tensor | Normalized) -> dict[str, Any]:
    """Features as the arguments of a convolution that normalises what it reads."""
    return {"x": x} if isinstance(x, Tensor) else x._asdict()


def linear_parameters(linear: Linear, branches: slice) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, in_channels, 1, 1]`` and bias ``[branches, channels]``."""
    assert linear.conv.bias is not None
    return linear.part(linear.conv.weight, branches), linear.part(linear.conv.bias, branches)
