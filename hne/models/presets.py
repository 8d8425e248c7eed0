"""The networks of the paper, and small networks for short runs, as blocks of layer specs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hierarchy import Hierarchy
from ..layers import Bottleneck, Conv, LayerSpec, PoolLinear

Block = tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Preset:
    """The tree of a network, and the layer specs of each block."""

    hierarchy: Hierarchy
    blocks: tuple[Block, ...]


def scaled(blocks: Sequence[Sequence[LayerSpec]], width: float) -> tuple[Block, ...]:
    """The same blocks with every channel count multiplied by ``width``, rounded to the nearest and at least 1.

    Raises:
        ValueError: ``width`` is not positive.
    """
    if not 0 < width < float("inf"):
        raise ValueError(f"width must be a positive number, got {width}")
    return tuple(tuple(layer.scaled(width) for layer in block) for block in blocks)


def _stage(channels: int, layers: int, stride: int = 1, reduction: int = 4) -> Block:
    """Bottlenecks as in ResNet; the first one has the stride."""
    return tuple(Bottleneck(channels, channels // reduction, stride=stride if i == 0 else 1) for i in range(layers))


def _inverted(in_channels: int, channels: int, layers: int, stride: int = 1) -> Block:
    """Inverted residuals of MobileNetV2 with expansion 6; the first one has the stride."""
    return tuple(
        Bottleneck(
            channels,
            middle=6 * (in_channels if i == 0 else channels),
            stride=stride if i == 0 else 1,
            activation="relu6",
            final_activation="none",
            projection=False,
        )
        for i in range(layers)
    )


RESNET50_CIFAR: tuple[Block, ...] = (  # Table 2
    (Conv(16), Conv(64, kernel_size=1)),
    _stage(64, 3),
    _stage(128, 4, stride=2),
    _stage(256, 4, stride=2),
    _stage(256, 5),
)

MOBILENETV2_075: tuple[Block, ...] = (  # Table 3
    (
        Conv(16, stride=2, activation="relu6"),
        Conv(16, kernel_size=1, activation="relu6"),
        *_inverted(16, 24, 2, stride=2),
    ),
    _inverted(24, 24, 3, stride=2),
    (*_inverted(24, 48, 4, stride=2), *_inverted(48, 72, 3)),
    (
        *_inverted(72, 120, 3, stride=2),
        Conv(720, kernel_size=1, activation="relu6"),
        PoolLinear(1280, activation="relu6"),
    ),
)

TINY: tuple[Block, ...] = (  # for images of 8x8 to 32x32
    (Conv(16), Conv(32, kernel_size=1)),
    _stage(32, 2, reduction=2),
    _stage(48, 2, stride=2, reduction=2),
    _stage(64, 2, stride=2, reduction=2),
)

MLP: tuple[Block, ...] = ((Conv(32, kernel_size=1),),) * 4  # for rows of a table: images of one pixel

PRESETS: dict[str, Preset] = {
    "hne_resnet50_cifar": Preset(Hierarchy.doubling(5), RESNET50_CIFAR),
    "hne_small_resnet50_cifar": Preset(Hierarchy.doubling(5), scaled(RESNET50_CIFAR, 0.5)),
    "hne_mobilenetv2_075": Preset(Hierarchy.doubling(4), MOBILENETV2_075),
    "hne_tiny": Preset(Hierarchy.doubling(4), TINY),
    "hne_mlp": Preset(Hierarchy.doubling(4), MLP),
}
