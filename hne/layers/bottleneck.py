"""Bottlenecks: the layers of HNE-ResNet and the inverted residuals of HNE-MobileNetV2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .executor import Executor, Features
from .layer import Layer
from .parameters import ConvNorm, Size
from .spec import LayerSpec, stride_text


@dataclass(frozen=True)
class Bottleneck(LayerSpec):
    """A 1x1 convolution to ``middle`` channels, a depthwise convolution with the stride, a 1x1 convolution to
    ``channels`` channels, and a shortcut. Each convolution has batch norm; ``activation`` follows the first two, and
    ``final_activation`` the sum with the shortcut.

    The defaults give the layer of HNE-ResNet (Table 2): the shortcut is a 1x1 convolution with batch norm if the layer
    strides, changes the channels or branches, else the identity. ``relu6``, no final activation and no projection give
    MobileNetV2's inverted residual (Table 3): the shortcut is the identity if the layer keeps size and channels; else
    there is none.

    Args:
        channels: Output channels per branch.
        middle: Channels between the two 1x1 convolutions.
        kernel_size: Kernel size of the depthwise convolution, odd.
        stride: Stride of the depthwise convolution and of a projecting shortcut.
        activation, final_activation: ``none``, ``relu`` or ``relu6``.
        projection: Whether the shortcut may be a convolution; if not, it is the identity or there is none.
    """

    middle: int
    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"
    final_activation: str = "relu"
    projection: bool = True

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels", "middle")

    def __str__(self) -> str:
        return f"bottleneck {self.middle}-{self.channels}{stride_text(self.stride)}"


class BottleneckLayer(Layer, spec=Bottleneck):
    """Implements :class:`Bottleneck`: ``final_activation(project(depthwise(expand(x))) + shortcut(x))``."""

    spec: Bottleneck

    def __init__(self, spec: Bottleneck, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.expand = ConvNorm(branches, in_channels, spec.middle)
        self.depthwise = ConvNorm(branches, spec.middle, spec.middle, spec.kernel_size, spec.stride, depthwise=True)
        self.project = ConvNorm(branches, spec.middle, spec.channels)
        same_shape = spec.stride == 1 and in_channels == spec.channels
        projected = spec.projection and not (same_shape and replicate == 1)
        self.shortcut = ConvNorm(branches, in_channels, spec.channels, 1, spec.stride) if projected else None
        self.identity = same_shape and not projected

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        spec = self.spec
        x, y = executor.entry_conv(self.expand, x, branches, replicate, spec.activation)
        residual = None
        if self.shortcut is not None:
            residual = executor.conv_norm(self.shortcut, x, branches, replicate)
        elif self.identity:
            residual = executor.replicate(x, branches, replicate, spec.channels)
        y = executor.conv_norm(self.depthwise, y, branches, 1, spec.activation)
        return executor.conv_norm(self.project, y, branches, 1, spec.final_activation, residual)

    def macs(self, size: Size) -> int:
        shortcut = 0 if self.shortcut is None else self.shortcut.macs(size)
        narrow = self.expand.macs(size) + self.depthwise.macs(size)
        return narrow + self.project.macs(self.output_size(size)) + shortcut

    def output_size(self, size: Size) -> Size:
        return self.depthwise.output_size(size)
