"""Fused layers with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

import hne_kernels as K


def random_convolution(
    rng: torch.Generator, branches: int, channels: int, out: int, kernel_size: int = 1
) -> K.FusedLayer:
    shape = branches, out, channels, kernel_size, kernel_size
    weight = torch.randn(shape, generator=rng, dtype=torch.float64) / (channels * kernel_size**2) ** 0.5
    return K.FusedLayer((K.pack_weight(weight), torch.randn(branches, out, generator=rng, dtype=torch.float64)))


def random_bottleneck(
    rng: torch.Generator,
    branches: int,
    channels: int,
    middle: int,
    out: int,
    kernel_size: int,
    stride: int,
    identity: bool = True,
) -> K.FusedLayer:
    def random(*shape: int) -> Tensor:
        return torch.randn(branches, *shape, generator=rng, dtype=torch.float64) / shape[-1] ** 0.5

    identity = identity and channels == out and stride == 1
    return K.FusedLayer(
        (
            K.pack_weight(random(middle, channels, 1, 1)),
            random(middle),
            random(kernel_size, kernel_size, middle),
            random(middle),
            K.pack_weight(random(out, middle, 1, 1)),
            random(out),
            None if identity else K.pack_weight(random(out, channels, 1, 1)),
            None if identity else random(out),
        ),
        stride=stride,
        activation="relu",
        final_activation="relu",
        identity=identity,
    )
