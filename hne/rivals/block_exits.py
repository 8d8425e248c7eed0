"""Early exits on the network that an HNE is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import Self

from ..hierarchy import Hierarchy
from ..layers import BranchLinear, LayerSpec
from ..models import FusedHNE
from .early_exit import EarlyExitNetwork


class BlockExits(EarlyExitNetwork):
    """One network with an exit after each block: the mean over the feature map, and a linear layer.

    It is computed by the kernels of :class:`hne.FusedHNE`, in inference up to the last wanted exit in one call.

    Args:
        blocks: The specs of the layers of each block, as for an :class:`hne.HNE`.
        num_classes: Number of logits.
        in_channels: Number of channels of the images.
    """

    def __init__(self, blocks: Sequence[Sequence[LayerSpec]], *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__(len(blocks), num_classes, in_channels)

        def network(count: int) -> FusedHNE:
            return FusedHNE(Hierarchy.single(count), blocks[:count], num_classes=num_classes, in_channels=in_channels)

        whole = network(len(blocks))
        self.blocks = whole.blocks
        self.exits = nn.ModuleList()
        for layers in whole.layers_of_blocks()[:-1]:
            head = BranchLinear(1, layers[-1].channels, num_classes)
            head.reset_parameters()
            self.exits.append(head)
        self.exits.append(whole.head)
        # The network up to each exit, which shares the layers. A tuple, so that they are no submodules.
        with torch.device("meta"):
            networks = [network(count) for count in range(1, len(blocks))]
        self._networks = (*networks, whole)
        for count, part in enumerate(networks, 1):
            part.blocks, part.head = nn.ModuleList(list(self.blocks)[:count]), self._exit(count - 1)

    def _exit(self, index: int) -> BranchLinear:
        head = self.exits[index]
        assert isinstance(head, BranchLinear)
        return head

    def train(self, mode: bool = True) -> Self:
        for network in self._networks:
            network.train(mode)
        return super().train(mode)

    def first_exits(self, x: Tensor, count: int) -> Tensor:
        network = self._networks[count - 1]
        # The last features, too, which the last exit has read.
        *features, _, last = network.executor().runner(network)(x, slice(0, 1), keep=True)
        first = []
        for index, maps in enumerate(features):  # [1, batch, height, width, channel]
            weight, bias = self._exit(index).weight_and_bias(slice(0, 1))
            assert bias is not None
            first.append(linear(maps.mean((2, 3))[0], weight[0, :, :, 0, 0], bias[0])[None])
        return torch.cat([*first, last])

    def macs(self, num_models: int | None = None, input_size: int | tuple[int, int] = (32, 32)) -> int:
        count = self._check_exits(num_models)
        heads = sum(self._exit(index).macs((1, 1)) for index in range(count - 1))
        return self._networks[count - 1].macs(1, input_size) + heads

    def config(self) -> dict[str, Any]:
        return {"block_exits": self._networks[-1].config()}
