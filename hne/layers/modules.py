"""Layer modules: the parameters of all branches, and a forward built from the operations of an :class:`Executor`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from .executor import Executor, Features
from .parameters import BranchLinear, ConvNorm, Size
from .specs import Bottleneck, Conv, LayerSpec, PoolLinear


class Layer(nn.Module, ABC):
    """A layer with the parameters of all its branches. ``class MyLayer(Layer, spec=MySpec)`` implements a spec.

    A subclass of such a class needs no spec, as PyTorch makes them for sharded (FSDP) and parametrized modules.

    Args:
        spec: The description of the layer.
        in_channels: Input channels of one branch.
        branches: Number of output branches.
        replicate: Number of output branches per input branch.
    """

    modules_by_spec: ClassVar[dict[type[LayerSpec], type[Layer]]] = {}
    spec: Any

    def __init_subclass__(cls, *, spec: type[LayerSpec] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if spec is not None:
            Layer.modules_by_spec[spec] = cls
        elif Layer in cls.__bases__:
            raise TypeError(f"class {cls.__name__}(Layer): expected the spec that it implements, spec=...; got none")

    def __init__(self, spec: LayerSpec, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        """Compute some ``branches`` of the output; arguments as in :class:`Executor`."""

    @abstractmethod
    def macs(self, size: Size) -> int:
        """Multiply-adds of one branch for one input of ``size``."""

    @abstractmethod
    def output_size(self, size: Size) -> Size:
        """Height and width of the output."""


def build_layer(spec: LayerSpec, in_channels: int, branches: int, replicate: int) -> Layer:
    """The module of a spec, with parameters for ``branches`` branches.

    Raises:
        TypeError: No :class:`Layer` implements the spec.
    """
    module = Layer.modules_by_spec.get(type(spec))
    if module is None:
        known = ", ".join(spec.__name__ for spec in Layer.modules_by_spec)
        raise TypeError(f"spec: expected one that a Layer implements ({known}), got {spec!r}")
    return module(spec, in_channels, branches, replicate)


class ConvLayer(Layer, spec=Conv):
    """Implements :class:`Conv`."""

    spec: Conv

    def __init__(self, spec: Conv, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.unit = ConvNorm(branches, in_channels, spec.channels, spec.kernel_size, spec.stride)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        return executor.conv_norm(self.unit, x, branches, replicate, self.spec.activation)

    def macs(self, size: Size) -> int:
        return self.unit.macs(size)

    def output_size(self, size: Size) -> Size:
        return self.unit.output_size(size)


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


class PoolLinearLayer(Layer, spec=PoolLinear):
    """Implements :class:`PoolLinear`."""

    spec: PoolLinear

    def __init__(self, spec: PoolLinear, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.linear = BranchLinear(branches, in_channels, spec.channels)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        return executor.linear(self.linear, executor.pool(x), branches, replicate, self.spec.activation)

    def macs(self, size: Size) -> int:
        return self.linear.macs()

    def output_size(self, size: Size) -> Size:
        return (1, 1)
