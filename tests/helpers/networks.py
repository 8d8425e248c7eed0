"""Small networks for the tests: all kinds of layers, on all kinds of trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from hne import HNE, Bottleneck, Conv, FusedHNE, Hierarchy, NaiveHNE, PoolLinear
from hne.layers import LayerSpec

Model = TypeVar("Model", bound=HNE)

TREES = {
    "doubling": Hierarchy((1, 2, 4)),
    "single": Hierarchy((1, 1, 1)),
    "odd": Hierarchy((1, 3, 6)),
    "heads-branch-too": Hierarchy((1, 2, 2), num_models=6),
    "two-trunks": Hierarchy((2, 2, 4)),
    "independent": Hierarchy.independent(3, 3),
    "multi-branch": Hierarchy.multi_branch(3, 4, shared=2),
    "multi-head": Hierarchy.multi_head(3, 4),
}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
each_model = pytest.mark.parametrize("kind", [FusedHNE, NaiveHNE])

BLOCKS = [
    [Conv(6, stride=2), Conv(8, kernel_size=1)],
    [Bottleneck(8, 4), Bottleneck(8, 5), Bottleneck(10, 4, stride=2)],
    [
        Bottleneck(10, 12, kernel_size=5, activation="relu6", final_activation="none", projection=False),
        Bottleneck(12, 18, stride=2, activation="relu6", final_activation="none", projection=False),
        PoolLinear(17, activation="relu6"),
    ],
]
IN_CHANNELS, NUM_CLASSES = 3, 5


def build(
    kind: type[Model],
    tree: Hierarchy,
    rng: torch.Generator,
    dtype: torch.dtype = torch.float64,
    blocks: Sequence[Sequence[LayerSpec]] = BLOCKS,
) -> Model:
    """A network in eval mode with random batch norms (a new batch norm would be close to the identity)."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = kind(tree, blocks, num_classes=NUM_CLASSES, in_channels=IN_CHANNELS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def small_size(preset: str, size: int = 32) -> int:
    """Height and width of images for a preset: ``size``, unless the preset asks for another."""
    return {"hne_mlp": 1, "hne_vit_tiny": 224}.get(preset, size)


def images(
    rng: torch.Generator, batch: int = 3, size: tuple[int, int] = (9, 12), dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random images ``[batch, 3, *size]``."""
    return torch.randn(batch, IN_CHANNELS, *size, generator=rng, dtype=torch.float64).to(dtype)
