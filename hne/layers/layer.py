"""The base class of layers: the parameters of all branches, and a forward of an :class:`Executor`'s operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from .executor import Executor, Features
from .parameters import Size
from .spec import LayerSpec


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
        self.in_channels = in_channels

    @property
    def channels(self) -> int:
        """Output channels of one branch: those of the spec, or of the input where the spec leaves them open."""
        channels: int | None = self.spec.channels
        return self.in_channels if channels is None else channels

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


def check_same_channels(spec: LayerSpec, in_channels: int) -> None:
    """Raise unless a layer that keeps the channels is described with those of its input, or with none.

    Raises:
        ValueError: The description has another number of channels.
    """
    if spec.channels not in (None, in_channels):
        name = f"{type(spec).__name__}.channels"
        raise ValueError(f"{name} must be the number of channels of the input, {in_channels}, got {spec.channels}")
