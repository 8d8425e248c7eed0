"""Max pooling and average pooling over windows. (Global pooling before a linear layer is part of the layer.)"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .executor import Executor, Features
from .layer import Layer, check_same_channels
from .parameters import Size, convolved
from .spec import LayerSpec, check_int, stride_text


@dataclass(frozen=True)
class MaxPool(LayerSpec):
    """The maximum over windows of pixels, as ``nn.MaxPool2d``.

    Args:
        channels: Channels of the input; by default those of the layer before.
        kernel_size: Height and width of the window.
        stride: Step in pixels.
        padding: Rows and columns on each side that no maximum takes into account, at most half of the window; by
            default half of it.
    """

    channels: int | None = None  # type: ignore[assignment]
    kernel_size: int = 3
    stride: int = 2
    padding: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_padding(self)

    def __str__(self) -> str:
        return f"max pool {self.kernel_size}x{self.kernel_size}{stride_text(self.stride)}"


@dataclass(frozen=True)
class AveragePool(LayerSpec):
    """The mean over windows of pixels, as ``nn.AvgPool2d``.

    Args:
        channels: Channels of the input; by default those of the layer before.
        kernel_size: Height and width of the window.
        stride: Step in pixels.
        padding: Rows and columns of zeros on each side, which count; at most half of the window. By default 0.
    """

    channels: int | None = None  # type: ignore[assignment]
    kernel_size: int = 3
    stride: int = 2
    padding: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_padding(self)

    def __str__(self) -> str:
        return f"average pool {self.kernel_size}x{self.kernel_size}{stride_text(self.stride)}"


class PoolingLayer(nn.Module):
    """Base class, beside :class:`Layer`, of both kinds of pooling.

    PyTorch's pooling reads the channels-last view of the features, without a copy; in inference on a CPU the fused
    layers pool. Pooling comes before the copies of a branching layer, which are then smaller.
    """

    spec: Any
    channels: int

    def __init__(self, spec: MaxPool | AveragePool, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)  # of Layer
        check_same_channels(spec, in_channels)
        self.branches = branches

    @property
    @abstractmethod
    def padding(self) -> int:
        """Rows and columns on each side."""

    @abstractmethod
    def pool(self, maps: Tensor) -> Tensor:
        """The pooling of ``[batch, channels, height, width]``."""

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        pooled = executor.channelwise(self._pool, self.channels, x)
        return executor.replicate(pooled, branches, replicate, self.channels)

    def _pool(self, maps: Tensor) -> Tensor:
        least = self.spec.kernel_size - 2 * self.padding
        height, width = maps.shape[-2:]
        if height < least or width < least:
            raise ValueError(f"{self.spec}: expected feature maps of at least {least}x{least}, got {height}x{width}")
        if maps.dim() == 4:
            return self.pool(maps)
        return self.pool(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])

    def macs(self, size: Size) -> int:
        return 0

    def output_size(self, size: Size) -> Size:
        return convolved(size, self.spec.kernel_size, self.spec.stride, self.padding)


class MaxPoolLayer(PoolingLayer, Layer, spec=MaxPool):
    """Implements :class:`MaxPool`."""

    @property
    def padding(self) -> int:
        return self.spec.kernel_size // 2 if self.spec.padding is None else self.spec.padding

    def pool(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, self.spec.kernel_size, self.spec.stride, self.padding)


class AveragePoolLayer(PoolingLayer, Layer, spec=AveragePool):
    """Implements :class:`AveragePool`."""

    @property
    def padding(self) -> int:
        return self.spec.padding or 0

    def pool(self, maps: Tensor) -> Tensor:
        padding = self.padding
        if padding and maps.requires_grad:  # on GPUs the gradient through PyTorch's own padding can be wrong
            maps, padding = F.pad(maps, [padding] * 4), 0  # (pytorch/pytorch issue 188344, in 2.11)
        return F.avg_pool2d(maps, self.spec.kernel_size, self.spec.stride, padding)


def _check_padding(spec: MaxPool | AveragePool) -> None:
    name = f"{type(spec).__name__}.padding"
    if spec.padding is not None:
        check_int(name, spec.padding, 0)
        if spec.padding > spec.kernel_size // 2:
            raise ValueError(f"{name} must be at most half of the window, {spec.kernel_size // 2}, got {spec.padding}")
