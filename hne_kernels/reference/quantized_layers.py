"""int8 layers in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quantized_layer import QuantizedLayer, unpack_quantized, unpack_quantized_depthwise


def quantized_layers(x: Tensor, layers: Sequence[QuantizedLayer]) -> list[Tensor]:
    """The output of every layer; see :class:`hne_kernels.QuantizedLayers`."""
    outputs = []
    for index, layer in enumerate(layers):
        x = _LAYERS[layer.kind](layer, x, index + 1 == len(layers))
        outputs.append(x)
    return outputs


def _quantize(layer: QuantizedLayer, x: Tensor, last: bool) -> Tensor:
    factor, zero = layer.tensors
    assert factor is not None
    assert zero is not None
    scaled = torch.nan_to_num(x * factor, nan=-(2.0**20)).clamp(-(2.0**20), 2.0**20)
    q = (scaled.round().int() + zero).clamp(0, 255).to(torch.uint8)
    return F.pad(q.permute(0, 2, 3, 1), (0, layer.channels - layer.in_channels))[None]


def _conv(layer: QuantizedLayer, x: Tensor, last: bool) -> Tensor:
    weight, bias, scale, zeros = layer.tensors
    assert weight is not None
    assert zeros is not None
    filters = unpack_quantized(weight, layer.channels, layer.kernel_size)
    outputs = []
    for branch in range(layer.branches):
        features = x[branch // layer.replicate].permute(0, 3, 1, 2).double()
        features = F.pad(features, (layer.padding,) * 4, value=float(zeros[branch, 0]))
        outputs.append(F.conv2d(features, filters[branch].double(), stride=layer.stride).permute(0, 2, 3, 1))
    sums = torch.stack(outputs) + _row(bias, layer.channels)
    return _requantized(sums, scale, zeros[:, 1])


def _bottleneck(layer: QuantizedLayer, x: Tensor, last: bool) -> Tensor:
    expand, expand_bias, expand_scale, depthwise, depthwise_bias, depthwise_scale, *end = layer.tensors
    project, bias, scale, shortcut, factor, zeros = end
    assert expand is not None
    assert depthwise is not None
    assert project is not None
    assert zeros is not None
    parents = torch.arange(layer.branches) // layer.replicate
    x = x[parents]
    y = _pointwise(x, expand, layer.middle) + _row(expand_bias, layer.middle)
    y = _requantized(y, expand_scale, zeros[:, 0])
    filters = unpack_quantized_depthwise(depthwise).double()
    maps = []
    for branch in range(layer.branches):
        features = y[branch].permute(0, 3, 1, 2).double()
        features = F.pad(features, (layer.kernel_size // 2,) * 4, value=float(zeros[branch, 0]))
        filtered = F.conv2d(features, filters[branch][:, None], stride=layer.stride, groups=layer.middle)
        maps.append(filtered.permute(0, 2, 3, 1))
    y = _requantized(torch.stack(maps) + _row(depthwise_bias, layer.middle), depthwise_scale, zeros[:, 1])
    sums = _row(bias, layer.channels).expand(*y.shape[:4], -1)
    if shortcut is not None:
        strided = x[:, :, :: layer.stride, :: layer.stride]
        sums = sums + _pointwise(strided, shortcut, layer.channels)
        sums = _rounded(sums, _row(factor, layer.channels))
    elif layer.identity:
        sums = sums + _rounded(x.double(), _row(factor, layer.channels))
    return _requantized(sums + _pointwise(y, project, layer.channels), scale, zeros[:, 2])


def _pool_linear(layer: QuantizedLayer, x: Tensor, last: bool) -> Tensor:
    mean_scale, numbers, weight, bias, scale, zeros = layer.tensors
    assert mean_scale is not None
    assert numbers is not None
    assert weight is not None
    assert zeros is not None
    x = x[torch.arange(layer.branches) // layer.replicate]
    pixels = x.shape[2] * x.shape[3]
    sums = x.double().sum((2, 3), keepdim=True) + pixels * numbers[:, 0].double().view(-1, 1, 1, 1, 1)
    pooled = _requantized(sums, (mean_scale / pixels).expand(-1, layer.in_channels), numbers[:, 1])
    sums = _pointwise(pooled, weight, layer.channels) + _row(bias, layer.channels)
    return (sums.float() * _row(scale, layer.channels)).flatten(2) if last else _requantized(sums, scale, zeros[:, 1])


_LAYERS = {"quantize": _quantize, "conv": _conv, "bottleneck": _bottleneck, "pool_linear": _pool_linear}


def _pointwise(x: Tensor, packed: Tensor, channels: int) -> Tensor:
    weight = unpack_quantized(packed, channels, 1)[..., 0, 0].double()
    return torch.einsum("gbhwc,goc->gbhwo", x.double(), weight)


def _row(values: Tensor | None, channels: int) -> Tensor:
    assert values is not None
    return values[:, None, None, None, :channels]


def _rounded(sums: Tensor, scale: Tensor) -> Tensor:
    """Sums, which are exact in float64, times float32 factors as float32, rounded."""
    return (sums.float() * scale).round().double()


def _requantized(sums: Tensor, scale: Tensor | None, zero: Tensor) -> Tensor:
    q = _rounded(sums, _row(scale, sums.shape[4])) + zero.view(-1, 1, 1, 1, 1)
    return q.clamp(0, 255).to(torch.uint8)
