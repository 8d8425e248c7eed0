"""The conversion of folded layers to int8: weights by their largest value, features by the range that was seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import hne_kernels as K

_MOST_SUM = 2.0**28  # each of at most three terms of a sum
_MOST_BIAS = 2.0**23  # so that a bias keeps its precision in steps of a sum


class Range(NamedTuple):
    """The smallest and the largest value of features, for each branch ``[G]`` float64; 0 lies between them."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Range:
        low, high = features.detach().flatten(1).aminmax(dim=1)
        return cls(low.double().clamp(max=0), high.double().clamp(min=0))

    def union(self, other: Range | None) -> Range:
        return self if other is None else Range(self.low.minimum(other.low), self.high.maximum(other.high))


class Steps(NamedTuple):
    """How the integers q of features stand for real numbers: ``scale * (q - zero)``, for each branch ``[G]``."""

    scale: Tensor  # float64
    zero: Tensor  # float64, whole numbers

    @classmethod
    def of(cls, seen: Range, least: Tensor) -> Steps:
        """The steps that cover a range; scales are at least ``least`` ``[G]``."""
        scale = ((seen.high - seen.low) / 255).maximum(least).float().double()
        return cls(scale, (-seen.low / scale).round().clamp(0, 255))

    def children(self, branches: int, replicate: int) -> Steps:
        """Those of the branches that ``replicate`` output branches per branch read."""
        parents = torch.arange(branches) // replicate
        return Steps(self.scale[parents], self.zero[parents])


class _Weights(NamedTuple):
    """Integers in steps of ``scale`` ``[G, O]``, for products in steps of ``sums``."""

    weight: Tensor  # [G, O, ...] float64, whole numbers
    sums: Tensor  # [G, O]

    @property
    def total(self) -> Tensor:
        return self.weight.flatten(2).sum(2)

    @property
    def most(self) -> Tensor:
        """The largest possible sum of products, as a real number ``[G, O]``."""
        return 255 * self.weight.flatten(2).abs().sum(2) * self.sums


def _quantized(weight: Tensor, steps: Steps, least: Tensor) -> _Weights:
    """Quantise filters ``[G, O, ...]`` for features in ``steps``; their sums have steps of at least ``least``."""
    weight = weight.double()
    scale = weight.flatten(2).abs().amax(2) / 64
    features = steps.scale[:, None]
    scale = scale.maximum(least / features).clamp(min=2.0**-100)
    return _Weights((weight / scale.view(*scale.shape, *(1,) * (weight.dim() - 2))).round(), scale * features)


def _output(seen: Range, most: Tensor) -> Steps:
    """The steps of the output of a layer whose sums are at most ``most`` ``[G, O]``, as real numbers."""
    return Steps.of(seen, (most.amax(1) / _MOST_SUM).clamp(min=2.0**-60))


def _numbers(bias: Tensor, scale: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    pad = K.pad_last
    return pad(bias.round().int(), multiple), pad(scale.float(), multiple)


class Quantizer:
    """Converts the layers of a network one after another.

    Args:
        seen: The range of the images.
        channels: Of the images.
    """

    def __init__(self, seen: Range, channels: int) -> None:
        self.steps = Steps.of(seen, torch.full((1,), 2.0**-60, dtype=torch.float64))
        self.channels = channels
        #: The layer that turns images into features.
        self.entry = K.QuantizedLayer(
            "quantize",
            ((1 / self.steps.scale).float(), self.steps.zero.int()),
            branches=1,
            in_channels=channels,
            channels=K.padded(channels),
        )

    def convert(self, layer: K.FusedLayer, seen: Sequence[Range], *, last: bool = False) -> K.QuantizedLayer:
        """Convert a layer, which reads the output of the one before; ``last``: its output is float32.

        Args:
            layer: A convolution, bottleneck or linear layer with its ``replicate``.
            seen: The ranges of its features, as :func:`observe` gives them.
        """
        if layer.is_bottleneck:
            return self._bottleneck(layer, seen)
        weight, bias = layer.weights
        assert weight is not None
        assert bias is not None
        filters, bias = _grouped(K.unpack_weight(weight, bias.shape[1])), bias.detach().double()
        branches, channels = bias.shape
        read = self.steps.children(branches, layer.replicate)
        tensors: tuple[Tensor, ...] = ()
        if layer.mean:
            pooled = Steps.of(
                Range(*(bound[torch.arange(branches) // layer.replicate] for bound in seen[0])), read.scale / 2**12
            )
            numbers = torch.stack([-read.zero, pooled.zero], 1).int()
            tensors = ((read.scale / pooled.scale).float()[:, None], numbers)
            read = pooled
        weights = _quantized(filters, read, bias.abs() / _MOST_BIAS)
        if last:
            self.steps = Steps(torch.ones(branches).double(), torch.zeros(branches).double())
        else:
            self.steps = _output(seen[-1], weights.most + bias.abs())
        scale = weights.sums / self.steps.scale[:, None]
        tensors += (
            K.pack_quantized(weights.weight.to(torch.int8)),
            *_numbers(bias / weights.sums - read.zero[:, None] * weights.total, scale, 16),
            torch.stack([read.zero, self.steps.zero], 1).int(),
        )
        self.channels = channels
        return K.QuantizedLayer(
            "pool_linear" if layer.mean else "conv",
            tensors,
            branches=branches,
            in_channels=filters.shape[2],
            channels=K.padded(channels),
            kernel_size=filters.shape[3],
            stride=layer.stride,
            padding=layer.padding,
            replicate=layer.replicate,
        )

    def _bottleneck(self, layer: K.FusedLayer, seen: Sequence[Range]) -> K.QuantizedLayer:
        expand, expand_bias, depthwise, depthwise_bias, project, project_bias, shortcut, shortcut_bias = (
            None if weight is None else weight.detach() for weight in layer.weights
        )
        assert expand is not None
        assert expand_bias is not None
        assert depthwise is not None
        assert depthwise_bias is not None
        assert project is not None
        assert project_bias is not None
        branches, middle = expand_bias.shape
        channels = project_bias.shape[1]
        x = self.steps.children(branches, layer.replicate)

        bias = expand_bias.double()
        first = _quantized(_grouped(K.unpack_weight(expand, middle)), x, bias.abs() / _MOST_BIAS)
        expanded = _output(seen[0], first.most + bias.abs())
        first_numbers = _numbers(
            bias / first.sums - x.zero[:, None] * first.total, first.sums / expanded.scale[:, None], 16
        )

        bias = depthwise_bias.double()
        second = _quantized(depthwise.permute(0, 3, 1, 2), expanded, bias.abs() / _MOST_BIAS)
        filtered = _output(seen[1], second.most + bias.abs())
        second_numbers = _numbers(
            bias / second.sums - expanded.zero[:, None] * second.total, second.sums / filtered.scale[:, None], 4
        )

        bias = project_bias.double()
        other: _Weights | None = None
        if shortcut is not None:
            assert shortcut_bias is not None
            bias = bias + shortcut_bias.double()
            other = _quantized(_grouped(K.unpack_weight(shortcut, channels)), x, bias.abs() / _MOST_BIAS)
            added = other.most + bias.abs()
        else:
            added = (x.scale * 255)[:, None].expand_as(bias) if layer.identity else torch.zeros_like(bias)
        third = _quantized(
            _grouped(K.unpack_weight(project, channels)),
            filtered,
            (bias.abs() / _MOST_BIAS).maximum(added / _MOST_SUM),
        )
        self.steps = _output(seen[2], third.most + added + bias.abs())
        bias = bias - filtered.zero[:, None] * third.total * third.sums
        factor: Tensor | None = None
        if other is not None:
            factor = other.sums / third.sums
            number = bias / other.sums - x.zero[:, None] * other.total
        elif layer.identity:
            factor = x.scale[:, None] / third.sums
            number = bias / third.sums - x.zero[:, None] * factor
        else:
            number = bias / third.sums
        self.channels = channels
        return K.QuantizedLayer(
            "bottleneck",
            (
                K.pack_quantized(first.weight.to(torch.int8)),
                *first_numbers,
                K.pack_quantized_depthwise(K.pad_last(second.weight.to(torch.int8).movedim(1, -1), 4).movedim(-1, 1)),
                *second_numbers,
                K.pack_quantized(third.weight.to(torch.int8)),
                *_numbers(number, third.sums / self.steps.scale[:, None], 16),
                None if other is None else K.pack_quantized(other.weight.to(torch.int8)),
                None if factor is None else K.pad_last(factor.float(), 16),
                torch.stack([expanded.zero, filtered.zero, self.steps.zero], 1).int(),
            ),
            branches=branches,
            in_channels=K.padded(expand.shape[4]),
            channels=K.padded(channels),
            middle=K.padded(middle),
            kernel_size=depthwise.shape[1],
            stride=layer.stride,
            replicate=layer.replicate,
            identity=layer.identity,
        )


def _grouped(filters: Tensor) -> Tensor:
    """Filters ``[G, O, C, k, k]`` with zeros for input channels up to a whole group."""
    return K.pad_last(filters.detach().movedim(2, -1), 4).movedim(-1, 2)


def observe(layer: K.FusedLayer, x: Tensor) -> tuple[Tensor, list[Range]]:
    """The output of a folded layer for features, and the ranges of the features that its int8 version stores."""
    y = layer(x)
    if layer.is_bottleneck:
        expand, expand_bias, depthwise, depthwise_bias, *_ = layer.weights
        assert expand is not None
        assert expand_bias is not None
        assert depthwise is not None
        expanded = K.fused_conv2d(x, expand, expand_bias, replicate=layer.replicate, activation=layer.activation)
        kernel_size = depthwise.shape[1]
        filtered = K.branch_depthwise_conv2d(
            expanded, depthwise.permute(0, 3, 1, 2), depthwise_bias, stride=layer.stride, padding=kernel_size // 2
        )
        filtered = filtered.clamp(*_BOUNDS[layer.activation])
        return y, [Range.of(expanded), Range.of(filtered), Range.of(y)]
    return y, ([Range.of(layer.input(x))] if layer.mean else []) + [Range.of(y)]


_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "none": (float("-inf"), None),
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
}
