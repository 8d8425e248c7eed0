"""A convolution with batch norm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import Self

from .executor import Executor, Features
from .layer import Layer
from .parameters import BranchConv, ConvNorm, Size
from .spec import LayerSpec, check_int, stride_text


@dataclass(frozen=True)
class Conv(LayerSpec):
    """A convolution, batch norm and an activation.

    Args:
        channels: Output channels per branch.
        kernel_size: Height and width of the kernel.
        stride: Step in pixels.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
        padding: Rows and columns of zeros on each side; by default half of the kernel size, with which a stride of 1
            and an odd kernel keep the size.
        groups: Groups of channels within a branch.
        norm: Without batch norm, the convolution may have a bias, and ``groups`` must be 1.
        bias: Whether a convolution without batch norm has a bias.
    """

    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"
    padding: int | None = None
    groups: int = 1
    norm: bool = True
    bias: bool = True

    later_fields: ClassVar[tuple[str, ...]] = ("padding", "groups", "norm", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding is not None:
            check_int("Conv.padding", self.padding, 0)
        check_int("Conv.groups", self.groups, 1)
        if self.channels % self.groups:
            raise ValueError(f"Conv.groups must divide Conv.channels, got {self.groups} and {self.channels}")
        if not self.norm and self.groups > 1:
            raise ValueError(f"Conv.groups must be 1 without batch norm, got {self.groups}")

    def scaled(self, width: float) -> Self:
        """As any layer; where each channel is a group, as in a depthwise convolution, each one stays a group."""
        if self.groups < self.channels or self.groups == 1:
            return super().scaled(width)
        channels = dataclasses.replace(self, groups=1).scaled(width).channels
        return dataclasses.replace(self, channels=channels, groups=channels)

    def __str__(self) -> str:
        return f"conv {self.kernel_size}x{self.kernel_size} {self.channels}{stride_text(self.stride)}"


class ConvLayer(Layer, spec=Conv):
    """Implements :class:`Conv`."""

    spec: Conv

    def __init__(self, spec: Conv, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        padding = spec.kernel_size // 2 if spec.padding is None else spec.padding
        shape = branches, in_channels, spec.channels, spec.kernel_size, spec.stride, padding
        self.unit = ConvNorm(*shape, groups=spec.groups) if spec.norm else BranchConv(*shape, bias=spec.bias)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        if isinstance(self.unit, BranchConv):
            return executor.conv(self.unit, x, branches, replicate, self.spec.activation)
        return executor.conv_norm(self.unit, x, branches, replicate, self.spec.activation)

    def macs(self, size: Size) -> int:
        return self.unit.macs(size)

    def output_size(self, size: Size) -> Size:
        return self.unit.output_size(size)
