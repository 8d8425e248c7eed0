"""The layers of a network in int8, and a program for each subtree that was computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import hne_kernels as K

from ..hierarchy import Hierarchy
from .base import MemberRunner, SubtreeRunner, member_runner


class QuantizedExecutor:
    """Computes subtrees of one network in int8. Features are uint8 ``[G, B, H, W, C]``.

    Args:
        hierarchy: The tree.
        entry: The layer that makes features of images.
        blocks: The layers of each block of the tree, with all branches.
        head: The last layer.
        num_classes: The outputs of the head that are no padding.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        entry: K.QuantizedLayer,
        blocks: Sequence[Sequence[K.QuantizedLayer]],
        head: K.QuantizedLayer,
        num_classes: int,
    ) -> None:
        self._hierarchy, self._entry, self._blocks, self._head = hierarchy, entry, blocks, head
        self._num_classes = num_classes
        everything = slice(0, hierarchy.num_models)
        self._programs: dict[tuple[int, int, int, bool], K.QuantizedLayers] = {}
        self.prepare(everything)  # checks all layers

    def runner(self, network: object) -> SubtreeRunner:
        return self.run

    def member_runner(self, network: object) -> MemberRunner:
        return member_runner(self.run)

    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        return x[:, samples]

    def run(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        program = self._programs.get((leaves.start, leaves.stop, first, keep)) or self.prepare(leaves, first, keep)
        results = program(x)
        if results[-1].shape[2] != self._num_classes:
            results[-1] = results[-1][..., : self._num_classes]
        if sizes is not None:
            results[-1] = K.prefix_mean(results[-1], sizes)
        return results

    def prepare(self, leaves: slice, first: int = 0, keep: bool = False) -> K.QuantizedLayers:
        """The layers that compute a subtree, kept for later calls.

        Raises:
            ValueError, TypeError: The layers do not fit each other.
        """
        layers = [] if first else [self._entry]
        ends = []
        *nodes, (heads, replicate) = self._hierarchy.nodes(leaves, first)
        for block, (branches, children) in zip(self._blocks[first:], nodes, strict=True):
            for layer in block:
                layers.append(layer.select_branches(branches, children))
                children = 1  # only the first layer of a block branches
            if keep:
                ends.append(len(layers) - 1)
        program = K.QuantizedLayers([*layers, self._head.select_branches(heads, replicate)], ends)
        self._programs[leaves.start, leaves.stop, first, keep] = program
        return program
