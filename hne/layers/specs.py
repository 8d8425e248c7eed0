"""Layer specs: layers described as plain data. A block of a network is a list of specs."""

from __future__ import annotations

import dataclasses
from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import Self

from .activations import ACTIVATIONS

_SPECS: dict[str, type[LayerSpec]] = {}


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Base class of layer specs. Every subclass is registered under its class name, which configs use.

    Args:
        channels: Output channels of one branch.
    """

    channels: int

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels",)  # channel counts, scaled by a width multiplier

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _SPECS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = f"{type(self).__name__}.{field.name}"
            if field.name in (*self.scaled_fields, "stride", "kernel_size"):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise TypeError(f"{name} must be an int, got {value!r}")
                if value < 1:
                    raise ValueError(f"{name} must be at least 1, got {value}")
            if field.name == "kernel_size" and value % 2 == 0:
                raise ValueError(f"{name} must be odd (the padding keeps the size), got {value}")
            if field.name.endswith("activation") and value not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")

    def scaled(self, width: float) -> Self:
        """The same layer with every channel count multiplied by ``width``, rounded to the nearest and at least 1."""
        counts = {name: max(1, int(getattr(self, name) * width + 0.5)) for name in self.scaled_fields}
        return dataclasses.replace(self, **counts)

    def config(self) -> dict[str, Any]:
        """The spec as a JSON-able dictionary, which :func:`spec_from_config` reads."""
        return {"layer": type(self).__name__, **dataclasses.asdict(self)}


def spec_from_config(config: dict[str, Any]) -> LayerSpec:
    """The spec for a dictionary that :meth:`LayerSpec.config` wrote.

    Raises:
        ValueError: The layer or a field is unknown, a field is missing, or a value is not valid.
    """
    fields = dict(config)
    name = fields.pop("layer", None)
    if name not in _SPECS:
        raise ValueError(f"layer must be one of {', '.join(_SPECS)}, got {name!r}")
    try:
        return _SPECS[name](**fields)
    except TypeError as error:
        raise ValueError(f"not the description of a {name}: {config} ({error})") from error


@dataclass(frozen=True)
class Conv(LayerSpec):
    """A convolution, batch norm and an activation.

    Args:
        channels: Output channels per branch.
        kernel_size: Odd; the padding is half of it, so a stride of 1 keeps the size.
        stride: Step in pixels; ``H`` input rows give ``ceil(H / stride)`` output rows.
        activation: ``none``, ``relu`` or ``relu6``.
    """

    kernel_size: int = 3
    stride: int = 1
    activation: str = "relu"

    def __str__(self) -> str:
        return f"conv {self.kernel_size}x{self.kernel_size} {self.channels}{_stride(self.stride)}"


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
        return f"bottleneck {self.middle}-{self.channels}{_stride(self.stride)}"


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


def _stride(stride: int) -> str:
    return f"/{stride}" if stride > 1 else ""
