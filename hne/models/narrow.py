"""The network of a slimmable model at a width below 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from ..executors import FoldedWeightCache, SubtreeExecutor
from ..hierarchy import Hierarchy
from ..layers import (
    BatchNormModule,
    BranchLinear,
    Layer,
    SkippedModuleError,
    has_hooks,
    narrow,
    narrow_layer,
)


class WideModel(Protocol):
    """What a narrow network needs of its model, which is a module."""

    hierarchy: Hierarchy
    num_classes: int
    in_channels: int

    def layers_of_blocks(self) -> list[list[Layer]]: ...
    def executor(self) -> SubtreeExecutor: ...
    def read_modules(self) -> Iterator[nn.Module]: ...


class NarrowNetwork(FoldedWeightCache):
    """The first channels of a model: what an executor computes at a width below 1.

    Args:
        model: The model, whose parameters are read in every call.
        width: Factor on every channel count.
        statistics: Whether batch norms have running statistics, for inference.
    """

    def __init__(self, model: WideModel, width: float, *, statistics: bool) -> None:
        super().__init__()
        self.model = (model,)  # a tuple, so that the model is no submodule
        self.width = width
        self.hierarchy = model.hierarchy
        self.blocks = nn.ModuleList()
        module, channels, replication = cast("nn.Module", model), model.in_channels, model.hierarchy.replication
        for number, layers in enumerate(model.layers_of_blocks()):
            block, replicate = nn.ModuleList(), replication[number]
            for index, wide in enumerate(layers):
                layer = narrow_layer(
                    module,
                    f"blocks.{number}.{index}",
                    wide.spec.scaled(width),
                    channels,
                    model.hierarchy.branches[number],
                    replicate,
                    statistics=statistics,
                )
                block.append(layer)
                channels, replicate = layer.channels, 1
            self.blocks.append(block)
        with torch.device("meta"):
            self.head = BranchLinear(model.hierarchy.num_models, channels, model.num_classes)
        narrow(self.head, (module, "head"), statistics=statistics)
        self._norms = tuple(module for module in self.modules() if isinstance(module, BatchNormModule))
        self.register_load_state_dict_post_hook(_note_loaded_statistics)

    def layers_of_blocks(self) -> list[list[Layer]]:
        """The layers of each block, in order."""
        return [list(cast("nn.ModuleList", block)) for block in self.blocks]  # type: ignore[arg-type]

    def check_hooks(self) -> None:
        """Raise if a layer of the model has hooks, as its narrow layer is called instead.

        Raises:
            SkippedModuleError: One has.
        """
        for layer in itertools.chain(*self.model[0].layers_of_blocks()):
            if has_hooks(layer):
                reason = (
                    f"its hooks run at full width only: remove them, or call the model without width={self.width:g}"
                )
                raise SkippedModuleError(layer, reason).within(self.model[0])

    def executor(self) -> SubtreeExecutor:
        """The executor of the model."""
        return self.model[0].executor()

    def read_modules(self) -> Iterator[nn.Module]:
        return itertools.chain(self.modules(), self.model[0].read_modules())

    @property
    def calibrated(self) -> bool:
        """Whether the running statistics were computed, or loaded from a model where they were."""
        return all(module.bn.calibrated for module in self._norms)

    @calibrated.setter
    def calibrated(self, value: bool) -> None:
        for module in self._norms:
            module.bn.calibrated = value  # type: ignore[assignment]

    def reset_statistics(self) -> None:
        """Forget the running statistics."""
        for module in self._norms:
            module.bn.reset_running_stats()


def _note_loaded_statistics(network: nn.Module, _: Any) -> None:
    """Note after loading whether the running statistics are those of a calibration."""
    for module in network.modules():
        if isinstance(module, BatchNormModule):
            count = module.bn.num_batches_tracked
            module.bn.calibrated = count is not None and bool(count > 0)  # type: ignore[assignment]
