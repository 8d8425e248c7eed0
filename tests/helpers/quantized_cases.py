"""Random int8 layers."""

from __future__ import annotations

import torch
from torch import Tensor

import hne_kernels as K


def features(*shape: int, extreme: bool = False) -> Tensor:
    """Random uint8 features; with ``extreme`` only the smallest and the largest."""
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    return (values >= 128).to(torch.uint8) * 255 if extreme else values


def _weight(*shape: int, extreme: bool) -> Tensor:
    values = torch.randint(-64, 65, shape).to(torch.int8)
    return torch.where(values < 0, -64, 64).to(torch.int8) if extreme else values


def _numbers(branches: int, channels: int, terms: int, extreme: bool, multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Bias and scale of sums of ``terms`` products, so that outputs are often in range; extreme ones rarely are."""
    bias = torch.randint(-3000, 3000, (branches, channels), dtype=torch.int32)
    scale = torch.rand(branches, channels) * (1.0 if extreme else 0.1 / terms**0.5) + 1e-4
    return K.pad_last(bias, multiple), K.pad_last(scale, multiple)


def _zeros(branches: int, count: int) -> Tensor:
    return torch.randint(0, 256, (branches, count), dtype=torch.int32) * torch.randint(0, 2, (branches, count)).int()


def quantize_layer(channels: int) -> K.QuantizedLayer:
    return K.QuantizedLayer(
        "quantize",
        (torch.rand(1) * 50 + 1, torch.randint(0, 256, (1,), dtype=torch.int32)),
        branches=1,
        in_channels=channels,
        channels=K.padded(channels),
    )


def conv_layer(
    parents: int,
    in_channels: int,
    channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    padding: int = 0,
    replicate: int = 1,
    extreme: bool = False,
) -> K.QuantizedLayer:
    branches, taps = parents * replicate, kernel_size * kernel_size
    weight = _weight(branches, channels, in_channels, kernel_size, kernel_size, extreme=extreme)
    return K.QuantizedLayer(
        "conv",
        (
            K.pack_quantized(weight),
            *_numbers(branches, channels, taps * in_channels, extreme),
            _zeros(branches, 2),
        ),
        branches=branches,
        in_channels=in_channels,
        channels=channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        replicate=replicate,
    )


def pool_linear_layer(parents: int, in_channels: int, channels: int, *, replicate: int = 1) -> K.QuantizedLayer:
    linear = conv_layer(parents, in_channels, channels, replicate=replicate)
    numbers = torch.stack([-_zeros(linear.branches, 1)[:, 0], _zeros(linear.branches, 1)[:, 0]], 1)
    tensors = (torch.rand(linear.branches, 1) + 0.5, numbers, *linear.tensors)
    return linear._replace(kind="pool_linear", tensors=tensors)


def bottleneck_layer(
    parents: int,
    in_channels: int,
    middle: int,
    channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    replicate: int = 1,
    shortcut: str = "none",
    extreme: bool = False,
) -> K.QuantizedLayer:
    """``shortcut``: none, identity or projected."""
    branches, taps = parents * replicate, kernel_size * kernel_size

    def matrix(columns: int, rows: int) -> Tensor:
        return K.pack_quantized(_weight(branches, rows, columns, 1, 1, extreme=extreme))

    depthwise = _weight(branches, middle, kernel_size, kernel_size, extreme=extreme)
    factor = K.pad_last(torch.rand(branches, channels) * 3, 16)
    return K.QuantizedLayer(
        "bottleneck",
        (
            matrix(in_channels, middle),
            *_numbers(branches, middle, in_channels, extreme),
            K.pack_quantized_depthwise(depthwise),
            *_numbers(branches, middle, taps, extreme, multiple=4),
            matrix(middle, channels),
            *_numbers(branches, channels, middle, extreme),
            matrix(in_channels, channels) if shortcut == "projected" else None,
            None if shortcut == "none" else factor,
            _zeros(branches, 3),
        ),
        branches=branches,
        in_channels=in_channels,
        channels=channels,
        middle=middle,
        kernel_size=kernel_size,
        stride=stride,
        replicate=replicate,
        identity=shortcut == "identity",
    )
