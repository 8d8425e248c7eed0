"""The networks of the paper, widely used networks, and small networks for short runs, as blocks of layer specs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hierarchy import Hierarchy
from ..layers import (
    BasicBlock,
    Bottleneck,
    Conv,
    DenseBottleneck,
    LayerNorm,
    LayerSpec,
    MaxPool,
    Norm,
    PatchEmbedding,
    PoolLinear,
    PreActivation,
    SelectToken,
    TransformerBlock,
)

Block = tuple[LayerSpec, ...]


@dataclass(frozen=True)
class Preset:
    """The tree of a network, the layer specs of each block, and the image size that the network is made for."""

    hierarchy: Hierarchy
    blocks: tuple[Block, ...]
    image_size: int = 32


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


def _basic(channels: int, layers: int, stride: int = 1) -> Block:
    """Basic blocks; the first one has the stride."""
    return tuple(BasicBlock(channels, stride=stride if i == 0 else 1) for i in range(layers))


def _dense(channels: int, layers: int, stride: int = 1) -> Block:
    """Bottlenecks of ResNet-50; the first one has the stride."""
    return tuple(DenseBottleneck(channels, channels // 4, stride=stride if i == 0 else 1) for i in range(layers))


def _pre_activation(channels: int, layers: int, stride: int = 1) -> Block:
    """Blocks of a WideResNet; the first one has the stride."""
    return tuple(PreActivation(channels, stride=stride if i == 0 else 1) for i in range(layers))


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

# Each stage of a ResNet is a block of the tree, and the first one has the stem, too. The stems are those of torchvision
# for images of 224 x 224 pixels, and the 3x3 convolution that is usual for CIFAR.
_STEM: Block = (Conv(64, kernel_size=7, stride=2), MaxPool())
_RESNET18: tuple[Block, ...] = (_basic(64, 2), _basic(128, 2, 2), _basic(256, 2, 2), _basic(512, 2, 2))

RESNET18: tuple[Block, ...] = ((*_STEM, *_RESNET18[0]), *_RESNET18[1:])
RESNET18_CIFAR: tuple[Block, ...] = ((Conv(64), *_RESNET18[0]), *_RESNET18[1:])
RESNET50: tuple[Block, ...] = ((*_STEM, *_dense(256, 3)), _dense(512, 4, 2), _dense(1024, 6, 2), _dense(2048, 3, 2))

# Four blocks of the tree from three groups: the last group, which has three quarters of the weights, is two blocks, so
# that the leaves share a half of it in pairs.
WRN28_10: tuple[Block, ...] = (
    (Conv(16, activation="none", norm=False, bias=False), *_pre_activation(160, 4)),
    _pre_activation(320, 4, stride=2),
    _pre_activation(640, 2, stride=2),
    (*_pre_activation(640, 2), Norm()),
)

_ENCODER: Block = (TransformerBlock(192, heads=3, hidden=768),) * 3

VIT_TINY: tuple[Block, ...] = (  # DeiT-Ti (Touvron et al. 2021): 12 encoder blocks
    (PatchEmbedding(192), *_ENCODER),
    _ENCODER,
    _ENCODER,
    (*_ENCODER, SelectToken(), LayerNorm()),  # the norm of the class token alone, which the head reads
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
    "hne_mobilenetv2_075": Preset(Hierarchy.doubling(4), MOBILENETV2_075, 224),
    "hne_resnet18": Preset(Hierarchy.doubling(4), RESNET18, 224),
    "hne_resnet50": Preset(Hierarchy.doubling(4), RESNET50, 224),
    "hne_resnet18_cifar": Preset(Hierarchy.doubling(4), RESNET18_CIFAR),
    "hne_wrn28_10": Preset(Hierarchy.doubling(4), WRN28_10),
    "hne_vit_tiny": Preset(Hierarchy.doubling(4), VIT_TINY, 224),
    "hne_tiny": Preset(Hierarchy.doubling(4), TINY),
    "hne_mlp": Preset(Hierarchy.doubling(4), MLP),
}
