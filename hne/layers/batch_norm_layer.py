"""Batch norm and activation as a layer of its own."""

from __future__ import annotations

from dataclasses import dataclass

from .executor import Executor, Features
from .layer import Layer, check_same_channels
from .parameters import BranchNorm, Size
from .spec import LayerSpec


@dataclass(frozen=True)
class Norm(LayerSpec):
    """Batch norm and an activation, as between the last block and the head of a WideResNet.

    Args:
        channels: Channels of the input; by default those of the layer before.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
    """

    channels: int | None = None  # type: ignore[assignment]
    activation: str = "relu"

    def __str__(self) -> str:
        return "norm"


class NormLayer(Layer, spec=Norm):
    """Implements :class:`Norm`."""

    spec: Norm

    def __init__(self, spec: Norm, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        check_same_channels(spec, in_channels)
        self.norm = BranchNorm(branches, in_channels)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        copies = executor.replicate(x, branches, replicate, self.channels)  # each child has its own batch norm
        return executor.norm(self.norm, copies, branches, self.spec.activation)

    def macs(self, size: Size) -> int:
        return 0

    def output_size(self, size: Size) -> Size:
        return size
