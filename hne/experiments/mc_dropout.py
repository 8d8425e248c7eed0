"""MC dropout: several passes through one network with dropout, as members of an ensemble (Gal & Ghahramani 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..layers import LayerSpec, Module
from ..models import HNE


def with_dropout(blocks: Sequence[Sequence[LayerSpec]], rate: float) -> list[list[LayerSpec]]:
    """The blocks of a network, each followed by dropout; the last one by pooling first, so that it drops what the
    head reads."""
    *body, last = map(list, blocks)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(rate))
    return [*([*block, Module(nn.Dropout(rate))] for block in body), [*last, Module(pooled)]]


class MCDropout(nn.Module):
    """An ensemble whose members are passes through one network with dropout; evaluated as an :class:`hne.HNE` is.

    Args:
        network: A model of one network with ``nn.Dropout``. All else of it follows the mode.
        passes: Number of members N.
    """

    def __init__(self, network: HNE, passes: int) -> None:
        super().__init__()
        self.network = network
        self.num_models = passes
        self.train(network.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return self

    def macs(self, num_models: int, input_size: tuple[int, int]) -> int:
        """Multiply-adds of ``num_models`` passes for one image."""
        return num_models * self.network.macs(1, input_size)

    def forward(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits ``[num_models, batch, classes]`` of independent passes, N by default, computed as one batch."""
        passes = self.num_models if num_models is None else num_models
        logits: Tensor = self.network(torch.cat([x] * passes))[0]
        return logits.unflatten(0, (passes, len(x)))
