"""Modules that are no layers of the package, and networks of them, for the tests of ``hne.Module``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hne import HNE, Bottleneck, Conv, Hierarchy, Module
from hne.layers import LayerSpec, ModuleLayer


class Shuffle(nn.Module):
    """A residual block whose ``view`` fails with channels-last memory, and a scale that no reset reaches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height * width).transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.scale * y


class Patches(nn.Module):
    """Pixels of a convolution as tokens."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class Gate(nn.Module):
    """A feature map or tokens to a vector."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.amax((2, 3) if x.dim() == 4 else 1)))


def stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))


def in_place_first() -> nn.Module:
    """Writes to its input; twice in place gives another result than once."""
    return nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.3))


def encoder(channels: int = 6) -> nn.Module:
    return nn.TransformerEncoderLayer(channels, 2, 10, dropout=0.0, batch_first=True)


def modules_only() -> list[list[LayerSpec]]:
    """Blocks of modules: feature maps, then tokens, then a vector."""
    return [
        [Module(stem())],
        [Module(in_place_first()), Module(Shuffle(6))],
        [Module(Patches(6, 6)), Module(encoder()), Module(Gate(6, 7))],
    ]


def mixed() -> list[list[LayerSpec]]:
    """Blocks of modules and of layers with kernels, in every order."""
    return [
        [Conv(8), Module(Shuffle(8))],
        [Module(in_place_first()), Bottleneck(8, 4), Module(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 6, 1)))],
        [Bottleneck(6, 5, stride=2), Module(encoder()), Conv(5, kernel_size=1), Module(Gate(5, 7)), Conv(9, 1)],
    ]


BLOCKS = {"modules": modules_only, "mixed": mixed}


def network(
    kind: type[HNE], tree: Hierarchy, rng: torch.Generator, blocks: str = "mixed", dtype: torch.dtype = torch.float64
) -> HNE:
    """A network in eval mode, with random batch norms."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = kind(tree, BLOCKS[blocks](), num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def module_layers(model: HNE) -> list[ModuleLayer]:
    """The layers of a network that are modules, in order."""
    return [layer for block in model.layers_of_blocks() for layer in block if isinstance(layer, ModuleLayer)]
