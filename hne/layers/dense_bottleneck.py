"""Bottlenecks with a dense or grouped convolution: the layers of ResNet-50 and of ResNeXt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .executor import Executor, Features
from .layer import Layer
from .parameters import ConvNorm, Size
from .residual import ResidualLayer, check_residual
from .spec import LayerSpec, check_int, stride_text


@dataclass(frozen=True)
class DenseBottleneck(LayerSpec):
    """A 1x1 convolution to ``middle`` channels, a convolution with the stride, a 1x1 convolution to ``channels``
    channels, and a shortcut (He et al., CVPR 2016; ``groups``: Xie et al., CVPR 2017), as torchvision's ``Bottleneck``.

    Each convolution has batch norm; ``activation`` follows the first two, and the sum with the shortcut.
    :class:`Bottleneck` has a depthwise convolution instead.

    Args:
        channels: Output channels per branch.
        middle: Channels between the two 1x1 convolutions.
        kernel_size: Kernel size of the convolution in the middle, odd.
        stride: Stride of that convolution and of a projecting shortcut.
        groups: Groups of that convolution within a branch.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
        projection: As in :class:`BasicBlock`.
        squeeze: As in :class:`BasicBlock`.
    """

    middle: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    activation: str = "relu"
    projection: str = "shape"
    squeeze: int = 0

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels", "middle", "squeeze")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_residual(self)
        check_int("DenseBottleneck.groups", self.groups, 1)
        if self.middle % self.groups:
            raise ValueError(
                f"DenseBottleneck.groups must divide DenseBottleneck.middle, got {self.groups} and {self.middle}"
            )

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"dense bottleneck {self.middle}-{self.channels}{stride_text(self.stride)}{groups}"


class DenseBottleneckLayer(ResidualLayer, Layer, spec=DenseBottleneck):
    """Implements :class:`DenseBottleneck`: ``activation(project(spatial(expand(x))) + shortcut(x))``."""

    spec: DenseBottleneck

    def __init__(self, spec: DenseBottleneck, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.expand = ConvNorm(branches, in_channels, spec.middle)
        shape = branches, spec.middle, spec.middle, spec.kernel_size, spec.stride
        self.spatial = ConvNorm(*shape, groups=spec.groups)
        self.project = ConvNorm(branches, spec.middle, spec.channels)
        self.add_shortcut(in_channels, branches, replicate)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        x, y = executor.entry_conv(self.expand, x, branches, replicate, self.spec.activation)
        residual = self.residual(executor, x, branches, replicate)
        y = executor.conv_norm(self.spatial, y, branches, 1, self.spec.activation)
        return self.finish(executor, self.project, y, branches, residual)

    def macs(self, size: Size) -> int:
        convolutions = self.expand.macs(size) + self.spatial.macs(size) + self.project.macs(self.output_size(size))
        return convolutions + self.shortcut_macs(size)

    def output_size(self, size: Size) -> Size:
        return self.spatial.output_size(size)
