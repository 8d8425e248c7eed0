"""How a subtree is computed, layer by layer."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..hierarchy import Hierarchy
from ..layers import BranchLinear, Executor, Features, Layer


class Network(Protocol):
    """The parts of a model that an executor computes."""

    hierarchy: Hierarchy
    head: BranchLinear

    def layers_of_blocks(self) -> list[list[Layer]]: ...


class SubtreeRunner(Protocol):
    """Computes subtrees of one network with the parameters as they are."""

    def __call__(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The nodes on the way from block ``first`` to some leaves.

        Args:
            x: Input features of block ``first``; images ``[batch, channels, height, width]`` for block 0.
            leaves: The first leaves, or a single one.
            first: A block, or ``num_blocks`` for the heads alone.
            keep: Whether the features after every block are results as well.
            sizes: Ensemble sizes for mean logits, as in :meth:`HNE.prefix_logits`, instead of the leaves' logits.

        Returns:
            The features after each block (with ``keep``), then the logits ``[leaves, batch, classes]`` or
            ``[len(sizes), batch, classes]``.
        """


class SubtreeExecutor(Executor):
    """Computes the subtree of a network; subclasses define the layout of features and the operations on them."""

    def runner(self, network: Network) -> SubtreeRunner:
        """The function that computes subtrees of ``network``."""
        return functools.partial(self.run, network)

    def run(
        self,
        network: Network,
        x: Tensor,
        leaves: slice,
        first: int = 0,
        *,
        keep: bool = False,
        sizes: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Compute a subtree layer by layer; see :class:`SubtreeRunner`."""
        results = []
        features: Features = self.from_images(x) if first == 0 else x
        *nodes, (heads, replicate) = network.hierarchy.nodes(leaves, first)
        for block, (branches, children) in zip(network.layers_of_blocks()[first:], nodes, strict=True):
            for layer in block:
                features = layer(self, features, branches, children)
                children = 1  # only the first layer of a block branches
            features = self.materialize(features)
            if keep:
                results.append(features)
        pooled = self.pool(features)
        if sizes is None:
            return [*results, self.logits(network.head, pooled, heads, replicate)]
        return [*results, self.prefix_logits(network.head, pooled, heads, replicate, sizes)]

    @abstractmethod
    def from_images(self, images: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` as features of one branch."""

    @abstractmethod
    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        """The features of some samples of the batch, by their indices."""

    def materialize(self, x: Features) -> Tensor:
        """Features as a tensor."""
        features: Tensor = x
        return features

    @abstractmethod
    def logits(self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        """Logits ``[leaves, batch, classes]`` from pooled features."""

    @abstractmethod
    def prefix_logits(
        self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]
    ) -> Tensor:
        """Mean logits of the first ``n`` leaves for each ``n`` of ``sizes``, from pooled features."""
