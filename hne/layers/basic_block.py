"""Basic blocks: the layers of ResNet-18 and ResNet-34."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .executor import Executor, Features
from .layer import Layer
from .parameters import ConvNorm, Size
from .residual import ResidualLayer, check_residual
from .spec import LayerSpec, stride_text


@dataclass(frozen=True)
class BasicBlock(LayerSpec):
    """Two convolutions with batch norm and a shortcut (He et al., CVPR 2016), as torchvision's ``BasicBlock``.

    ``activation`` follows the first convolution, and the sum with the shortcut.

    Args:
        channels: Output channels per branch.
        kernel_size: Kernel size of both convolutions, odd.
        stride: Stride of the first convolution and of a projecting shortcut.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
        projection: ``shape``: the shortcut is a 1x1 convolution with batch norm if the layer strides or changes the
            channels, else the identity. ``branch``: also a convolution if the tree branches in this layer, as in the
            HNE paper's Table 2.
        squeeze: Hidden channels of a squeeze-and-excitation before the sum; 0 for none.
    """

    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"
    projection: str = "shape"
    squeeze: int = 0

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels", "squeeze")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_residual(self)

    def __str__(self) -> str:
        return f"basic block {self.channels}{stride_text(self.stride)}"


class BasicBlockLayer(ResidualLayer, Layer, spec=BasicBlock):
    """Implements :class:`BasicBlock`: ``activation(second(first(x)) + shortcut(x))``."""

    spec: BasicBlock

    def __init__(self, spec: BasicBlock, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.first = ConvNorm(branches, in_channels, spec.channels, spec.kernel_size, spec.stride)
        self.second = ConvNorm(branches, spec.channels, spec.channels, spec.kernel_size)
        self.add_shortcut(in_channels, branches, replicate)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        x, y = executor.entry_conv(self.first, x, branches, replicate, self.spec.activation)
        residual = self.residual(executor, x, branches, replicate)
        return self.finish(executor, self.second, y, branches, residual)

    def macs(self, size: Size) -> int:
        return self.first.macs(size) + self.second.macs(self.output_size(size)) + self.shortcut_macs(size)

    def output_size(self, size: Size) -> Size:
        return self.first.output_size(size)
