"""Execution by the kernels: branch-major features, and no replication in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

import hne_kernels as K

from ..layers import batch_norm
from ..layers.modules import ACTIVATIONS, Execution, Features, Layer, Linear, Unit


class Normalized(NamedTuple):
    """``activation((x - mean) * scale + shift + residual)``: what a unit hands to the next, who normalises as it reads.

    Vectors are ``[branches, channels]``.
    """

    x: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    activation: str
    residual: Tensor | None = None


class Projected(NamedTuple):
    """``activation((conv(x) - mean) * scale + shift + residual)`` of a pointwise convolution, computed where this is
    read: a map wider than the one that it is made of need not lie in memory.
    """

    x: Normalized
    weight: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor
    activation: str
    residual: Tensor | Normalized | None = None

    def written(self, next_weight: Tensor | None = None) -> list[Tensor]:
        """The map, and with ``next_weight`` the convolution that reads it, with mean and variance."""
        added = self.residual
        if isinstance(added, Normalized):
            vectors = {"residual_mean": added.mean, "residual_scale": added.scale, "residual_shift": added.shift}
            residual: dict[str, Any] = {"residual": added.x, **vectors}
        else:
            residual = {"residual": added}
        results = K.branch_projection(
            weight=self.weight,
            out_mean=self.mean,
            out_scale=self.scale,
            out_shift=self.shift,
            out_activation=self.activation,
            next_weight=next_weight,
            **residual,
            **_read(self.x),
        )
        return [result for result in results if result is not None]


class Fused(Execution):
    """Features are ``[branches, batch, height, width, channels]``; inside a layer they may be :class:`Normalized`
    or :class:`Projected`. Differentiable: for training, and wherever gradients are wanted.
    """

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        return (images,)

    def enter(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1).unsqueeze(0)

    def select(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(1, samples)

    def block(self, layers: Sequence[Layer], x: Tensor, branches: slice, replicate: int) -> Tensor:
        features: Features = x
        for layer in layers:
            features = layer(self, features, branches, replicate)
            replicate = 1  # only the first layer branches
        return written(features)

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
        if unit.bn.training and replicate == 1 and _projects(unit, x):
            statistics = K.branch_conv2d_moments(weight=weight, **_read(x))
            normalized: Features = Projected(x, weight, *_normalization(unit, branches, x.x, *statistics), activation)
        elif unit.bn.training:
            convolve = K.branch_depthwise_conv2d_stats if unit.depthwise else K.branch_conv2d_stats
            normalized = _normalized(unit, branches, activation, *convolve(weight=weight, **_read(x), **geometry))
        else:
            y = (K.branch_depthwise_conv2d if unit.depthwise else K.branch_conv2d)(written(x), weight, **geometry)
            mean, var = batch_norm.running(unit, branches)
            normalized = Normalized(y, mean, *batch_norm.scale_and_shift(unit, branches, var), activation)
        if residual is None:
            return normalized
        if isinstance(normalized, Projected) and _is_affine(residual):
            return normalized._replace(residual=residual)
        return normalized._replace(residual=written(residual))

    def first_unit(
        self, unit: Unit, x: Features, branches: slice, replicate: int, activation: str
    ) -> tuple[Tensor, Features]:
        if isinstance(x, Tensor) or not unit.bn.training or replicate > 1:
            x = written(x)
            return x, self.unit(unit, x, branches, replicate, activation)
        weight = unit.part(unit.conv.weight, branches)
        if isinstance(x, Projected):
            x, *y = x.written(weight)
        else:
            x, *y = K.branch_residual_conv2d_stats(weight=weight, **x._asdict())
        return x, _normalized(unit, branches, activation, *y)

    def linear(
        self, linear: Linear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        weight, bias = linear_parameters(linear, branches)
        return ACTIVATIONS[activation](K.branch_conv2d(x, weight, bias, replicate=replicate))

    def pool(self, x: Features) -> Tensor:
        x = written(x)
        # The gradient of a sum, other than that of a mean, is no map in memory.
        return x.sum((2, 3), keepdim=True) / x.shape[2:4].numel()

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


def _projects(unit: Unit, x: Features) -> bool:
    """Whether ``unit`` is the wide end of a bottleneck that is better computed where it is read."""
    pointwise = unit.kernel_size == unit.stride == 1 and not unit.depthwise
    return pointwise and isinstance(x, Normalized) and x.residual is None and K.projection_pays(x.x, unit.channels)


def _is_affine(x: Features) -> bool:
    """Whether ``x`` is normalised and nothing else: it can be added as it is read."""
    return isinstance(x, Normalized) and x.activation == "none" and x.residual is None


def _normalization(
    unit: Unit, branches: slice, like: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(mean, scale, shift)`` of the batch norm in training: by statistics of a batch of maps as large as ``like``."""
    mean, var = batch_norm.of_batch(unit, branches, mean, var, like.shape[1:4].numel())
    return mean, *batch_norm.scale_and_shift(unit, branches, var)


def _normalized(unit: Unit, branches: slice, activation: str, y: Tensor, mean: Tensor, var: Tensor) -> Normalized:
    """The batch norm of ``y``, in training: by the statistics of the batch, which are given."""
    return Normalized(y, *_normalization(unit, branches, y, mean, var), activation)


def written(x: Features) -> Tensor:
    """The features as a tensor."""
    if isinstance(x, Projected):
        return x.written()[0]
    return x if isinstance(x, Tensor) else K.branch_normalize(**x._asdict())


def _read(x: Features) -> dict[str, Any]:
    """Features as the arguments of a convolution that normalises what it reads."""
    if not isinstance(x, Normalized) or x.residual is not None:
        return {"x": written(x)}
    arguments: dict[str, Any] = x._asdict()
    del arguments["residual"]
    return arguments


def linear_parameters(linear: Linear, branches: slice) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, in_channels, 1, 1]`` and bias ``[branches, channels]``."""
    assert linear.conv.bias is not None
    return linear.part(linear.conv.weight, branches), linear.part(linear.conv.bias, branches)
