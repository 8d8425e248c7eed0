"""Squeeze-and-excitation: each channel is scaled by a number between 0 and 1 that depends on the whole feature map."""

from __future__ import annotations

from torch import nn

from .executor import Executor, Features
from .parameters import BranchLinear


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu et al., CVPR 2018): ``x * sigmoid(expand(relu(reduce(mean(x)))))``.

    The product is PyTorch's: the scales depend on all pixels, so no kernel that computes ``x`` knows them.

    Args:
        branches: Number of branches.
        channels: Channels of one branch.
        hidden: Outputs of the first linear layer.
    """

    def __init__(self, branches: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = BranchLinear(branches, channels, hidden)
        self.expand = BranchLinear(branches, hidden, channels)

    def forward(self, executor: Executor, x: Features, branches: slice) -> Features:
        """Scale the channels of ``x``, which has one branch for each of ``branches``."""
        channels = self.expand.channels
        x = executor.channelwise(lambda maps: maps, channels, x)  # computed once, as it is read twice
        hidden = executor.conv(self.reduce, executor.pool(x), branches, 1, "relu")
        scales = executor.conv(self.expand, hidden, branches)
        return executor.channelwise(lambda maps, scales: maps * scales.sigmoid(), channels, x, scales)

    def macs(self) -> int:
        """Multiply-adds of one branch for one input."""
        return self.reduce.macs((1, 1)) + self.expand.macs((1, 1))
