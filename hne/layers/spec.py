"""The base class of layer specs: layers described as plain data. A block of a network is a list of specs."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from .activations import ACTIVATIONS

_SPECS: dict[str, type[LayerSpec]] = {}


@dataclass(frozen=True)
class LayerSpec(ABC):
    """Base class of layer specs. Every subclass is registered under its class name, which configs use.

    Args:
        channels: Output channels of one branch. A layer that takes them from its input has the default None.
    """

    channels: int

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels",)  # channel counts, scaled by a width multiplier
    later_fields: ClassVar[tuple[str, ...]] = ()  # written only if not the default, as configs of before lack them

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _SPECS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = f"{type(self).__name__}.{field.name}"
            counted = field.name in (*self.scaled_fields, "stride", "kernel_size")
            if counted and not (value is None and field.default is None):
                check_int(name, value, 0 if field.default == 0 else 1)
            if field.name.endswith("activation") and value not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")

    def scaled(self, width: float) -> Self:
        """The same layer with every channel count multiplied by ``width``, rounded to the nearest and at least 1."""
        counts = {name: getattr(self, name) for name in self.scaled_fields}
        scaled = {name: max(1, int(count * width + 0.5)) for name, count in counts.items() if count}
        return dataclasses.replace(self, **scaled)

    def config(self) -> dict[str, Any]:
        """The spec as a JSON-able dictionary, which :func:`spec_from_config` reads."""
        written = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in self.later_fields and written[field.name] == field.default:
                del written[field.name]
        return {"layer": type(self).__name__, **written}

    @classmethod
    def from_fields(cls, fields: dict[str, Any], templates: Iterator[nn.Module]) -> Self:
        """The spec of the fields in a config; arguments as in :func:`spec_from_config`."""
        return cls(**fields)


def spec_from_config(config: dict[str, Any], templates: Iterable[nn.Module] = ()) -> LayerSpec:
    """The spec for a dictionary that :meth:`LayerSpec.config` wrote.

    Args:
        config: The dictionary.
        templates: An iterator of the modules that configs name and do not hold; a spec that needs one takes the next.

    Raises:
        ValueError: The layer or a field is unknown, a field is missing, a value is not valid, or the next template is
            missing or of another class.
    """
    fields = dict(config)
    name = fields.pop("layer", None)
    if name not in _SPECS:
        raise ValueError(f"layer must be one of {', '.join(_SPECS)}, got {name!r}")
    try:
        return _SPECS[name].from_fields(fields, iter(templates))
    except TypeError as error:
        raise ValueError(f"not the description of a {name}: {config} ({error})") from error


def check_int(name: str, value: Any, least: int) -> None:
    """Raise unless a field is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_odd(name: str, kernel_size: int) -> None:
    """Raise unless a kernel size is odd, with which a padding of half of it keeps the size of the feature map."""
    if kernel_size % 2 == 0:
        raise ValueError(f"{name} must be odd, got {kernel_size}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless a field is a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive, got {value}")


def stride_text(stride: int) -> str:
    """The stride as a suffix of a layer's description."""
    return f"/{stride}" if stride > 1 else ""
