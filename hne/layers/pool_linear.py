"""Global pooling and a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from .executor import Executor, Features
from .layer import Layer
from .parameters import BranchLinear, Size
from .spec import LayerSpec


@dataclass(frozen=True)
class PoolLinear(LayerSpec):
    """Global average pooling and a linear layer with bias and activation; the output has one pixel.

    Args:
        channels: Output features per branch.
        activation: ``none``, ``relu`` or ``relu6``.
    """

    activation: str = "relu"

    def __str__(self) -> str:
        return f"pool, linear {self.channels}"


class PoolLinearLayer(Layer, spec=PoolLinear):
    """Implements :class:`PoolLinear`."""

    spec: PoolLinear

    def __init__(self, spec: PoolLinear, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.linear = BranchLinear(branches, in_channels, spec.channels)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        return executor.conv(self.linear, executor.pool(x), branches, replicate, self.spec.activation)

    def macs(self, size: Size) -> int:
        return self.linear.macs((1, 1))

    def output_size(self, size: Size) -> Size:
        return (1, 1)
