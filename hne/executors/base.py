"""Base class of the executors: computes a subtree of a network layer by layer."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

import hne_kernels as K

from ..hierarchy import Hierarchy
from ..layers import (
    BranchLinear,
    Executor,
    Features,
    Layer,
    SkippedModuleError,
    check_never_called,
    global_hook_dicts,
    has_hooks,
)


class Network(Protocol):
    """The parts of a model that an executor computes."""

    hierarchy: Hierarchy
    blocks: nn.ModuleList
    head: BranchLinear

    def layers_of_blocks(self) -> list[list[Layer]]: ...


class SubtreeRunner(Protocol):
    """A function that computes subtrees of one network."""

    def __call__(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Compute some leaves, and all nodes above them from block ``first`` on.

        Args:
            x: Input features of block ``first``; images ``[batch, channels, height, width]`` for block 0.
            leaves: The first n leaves, ``slice(0, n)``, or a single leaf, ``slice(n, n + 1)``.
            first: The first block to compute, or ``num_blocks`` for the heads alone.
            keep: Return the features after every block, too.
            sizes: Return mean logits of the ensembles of these sizes, as :meth:`HNE.prefix_logits`, instead of the
                logits of the leaves.

        Returns:
            With ``keep`` the features after each block; last the logits ``[leaves, batch, classes]``, or
            ``[len(sizes), batch, classes]`` with ``sizes``.
        """


class Member(NamedTuple):
    """What a step of anytime inference computes."""

    features: list[Tensor]  # after each block that was computed
    logits: Tensor  # of the leaf alone, [1, batch, classes]
    total: Tensor  # of the logits so far, [batch, classes] in float32 or float64
    mean: Tensor  # of the logits so far, [batch, classes]


class MemberRunner(Protocol):
    """A function that computes one leaf of a network after another."""

    def __call__(self, x: Tensor, leaf: int, first: int, total: Tensor | None) -> Member:
        """Compute a leaf, and all nodes above it from block ``first`` on.

        Args:
            x: Input features of block ``first``, or images; as for :class:`SubtreeRunner`.
            leaf: Its number.
            first: The first block to compute.
            total: The total of the leaves before this one; None for the first leaf.
        """


def member_runner(run: SubtreeRunner) -> MemberRunner:
    """The function that computes leaves by a function for any subtree."""

    def run_member(x: Tensor, leaf: int, first: int, total: Tensor | None) -> Member:
        *features, logits = run(x, slice(leaf, leaf + 1), first, keep=True)
        return Member(features, logits, *K.add_member(logits, total, leaf + 1))

    return run_member


class SubtreeExecutor(Executor):
    """Computes subtrees of a network. Subclasses define the layout of features and the operations on them."""

    def runner(self, network: Network) -> SubtreeRunner:
        """The function that computes subtrees of ``network``."""
        return functools.partial(self.run, network)

    def member_runner(self, network: Network) -> MemberRunner:
        """The function that computes one leaf of ``network`` after another."""
        return member_runner(self.runner(network))

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
        """Compute a subtree layer by layer; see :class:`SubtreeRunner`.

        Raises:
            SkippedModuleError: A module of the network relies on being called, but is not; the message says which one.
        """
        results = []
        features: Features = self.from_images(x) if first == 0 else x
        *nodes, (heads, replicate) = network.hierarchy.nodes(leaves, first)
        all_hooked = any(global_hook_dicts())
        try:
            check_containers(network)
            for block, (branches, children) in zip(network.layers_of_blocks()[first:], nodes, strict=True):
                for layer in block:
                    if all_hooked or has_hooks(layer):
                        features = layer(self.of_tensors(), self.materialize(features), branches, children)
                    else:
                        features = layer(self, features, branches, children)
                    children = 1  # only the first layer of a block branches
                if keep:
                    features = self.materialize(features)
                    results.append(features)
            pooled = self.pool(features)
            if sizes is None:
                return [*results, self.logits(network.head, pooled, heads, replicate)]
            return [*results, self.prefix_logits(network.head, pooled, heads, replicate, sizes)]
        except SkippedModuleError as error:
            raise error.within(network) from None

    def of_tensors(self) -> SubtreeExecutor:
        """An executor with the same layout of features, all of which are tensors; hooks of layers see them."""
        return self

    @abstractmethod
    def from_images(self, images: Tensor) -> Tensor:
        """The features, of one branch, for images ``[batch, channels, height, width]``."""

    @abstractmethod
    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        """The features of some samples of the batch; ``samples`` are their indices, ``[K]`` int64."""

    def materialize(self, x: Features) -> Tensor:
        """The features as a tensor, computed now if an operation has deferred it."""
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


def check_containers(network: Network) -> None:
    """Raise if the lists of a network's layers have hooks.

    Raises:
        SkippedModuleError: They have; a list is never called, so its hooks would not run.
    """
    for container in (network.blocks, *network.blocks):
        check_never_called(container, "register the hook on a layer of the block")
