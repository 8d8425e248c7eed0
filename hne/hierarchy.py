"""The tree of an ensemble: the branches of each block, and the path of each leaf through them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, init=False)
class Hierarchy:
    """The tree of an ensemble. Its leaves are the models, numbered from 0.

    Block ``b`` exists in ``branches[b]`` independent copies, the branches. Leaf ``n`` runs through branch
    ``n * branches[b] // num_models`` of block ``b``. This order is depth first, so the first ``n`` leaves need
    the *first* ``ceil(n * branches[b] / num_models)`` branches: a smaller ensemble is a leading slice of every weight.

    The systems that the paper compares are trees, and so is the student of Hydra::

        Hierarchy((1, 2, 4, 8, 16))               hierarchical: HNE               Hierarchy.doubling(5, 16)
        Hierarchy((16, 16, 16, 16, 16))           independent networks            Hierarchy.independent(5, 16)
        Hierarchy((1, 1, 1, 16, 16))              shared trunk, then independent  Hierarchy.multi_branch(5, 16, 3)
        Hierarchy((1, 1, 1, 1, 1), num_models=16) only the heads branch: Hydra    Hierarchy.multi_head(5, 16)
        Hierarchy((1, 1, 1, 1, 1))                one network                     Hierarchy.single(5)

    Args:
        branches: Number of branches of each block; each number divides the next.
        num_models: Number of leaves, a multiple of the last number of branches and by default equal to it. If it is
            larger, several heads share a branch of the last block.

    Raises:
        TypeError: A count is not an int.
        ValueError: No block, a count below 1, or a count that does not divide its successor.
    """

    branches: tuple[int, ...]
    num_models: int

    def __init__(self, branches: Sequence[int], num_models: int | None = None) -> None:
        branches = tuple(branches)
        if not branches:
            raise ValueError("branches must name at least one block, got ()")
        leaves = branches[-1] if num_models is None else num_models
        levels = (*branches, leaves)
        for count in levels:
            if not isinstance(count, int) or isinstance(count, bool):
                raise TypeError(f"branches and num_models must be ints, got {count!r}")
            if count < 1:
                raise ValueError(f"branches and num_models must be at least 1, got {count}")
        for block, (count, following) in enumerate(zip(branches, levels[1:], strict=True)):
            if following % count:
                name = "num_models" if block + 1 == len(branches) else f"branches[{block + 1}]"
                raise ValueError(
                    f"every count of branches must divide the next: branches[{block}] = {count} "
                    f"does not divide {name} = {following}"
                )
        object.__setattr__(self, "branches", branches)
        object.__setattr__(self, "num_models", leaves)

    @classmethod
    def doubling(cls, num_blocks: int, num_models: int | None = None) -> Hierarchy:
        """The paper's tree: the number of branches doubles from block to block, up to ``num_models``.

        Blocks before the first doubling have one branch, shared by all models. ``num_models`` is a power of two, by
        default ``2 ** (num_blocks - 1)``.
        """
        num_blocks = _at_least_one("num_blocks", num_blocks)
        largest = 2 ** (num_blocks - 1)
        leaves = largest if num_models is None else _at_least_one("num_models", num_models)
        if leaves & (leaves - 1) or leaves > largest:
            raise ValueError(
                f"a doubling tree of {num_blocks} blocks has a power of two of at most {largest} models, "
                f"got num_models = {leaves}; describe another tree with Hierarchy(branches, num_models)"
            )
        return cls([max(1, leaves * 2**block // largest) for block in range(num_blocks)])

    @classmethod
    def independent(cls, num_blocks: int, num_models: int) -> Hierarchy:
        """``num_models`` networks that share nothing."""
        return cls([num_models] * _at_least_one("num_blocks", num_blocks))

    @classmethod
    def multi_branch(cls, num_blocks: int, num_models: int, shared: int) -> Hierarchy:
        """The first ``shared`` blocks (1 to ``num_blocks``) are one trunk; every model has its own copy of the rest."""
        num_blocks = _at_least_one("num_blocks", num_blocks)
        if not 1 <= shared <= num_blocks:
            raise ValueError(f"shared must lie between 1 and num_blocks = {num_blocks}, got {shared}")
        return cls([1] * shared + [num_models] * (num_blocks - shared), num_models)

    @classmethod
    def multi_head(cls, num_blocks: int, num_models: int) -> Hierarchy:
        """One network with ``num_models`` heads (the student of Hydra)."""
        return cls.multi_branch(num_blocks, num_models, num_blocks)

    @classmethod
    def single(cls, num_blocks: int) -> Hierarchy:
        """One network."""
        return cls.independent(num_blocks, 1)

    @property
    def num_blocks(self) -> int:
        return len(self.branches)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Number of nodes at each level of the tree: the branches of every block, then the leaves (a head each)."""
        return (*self.branches, self.num_models)

    @cached_property
    def replication(self) -> tuple[int, ...]:
        """For each level, the number of nodes per node of the level above: features are replicated this many times when
        they enter the block or the heads. The image is the single node above block 0."""
        levels = self.levels
        return tuple(b // a for a, b in zip((1, *levels), levels, strict=False))

    def needed(self, num_models: int) -> tuple[int, ...]:
        """Number of nodes of each level that the first ``num_models`` leaves run through; they are the first nodes of
        their level. The last entry is the number of heads, ``num_models`` itself.

        Raises:
            TypeError, ValueError: ``num_models`` is not an int from 1 to ``self.num_models``.
        """
        self.check_num_models(num_models)
        return tuple(-(-num_models * count // self.num_models) for count in self.levels)

    def check_num_models(self, num_models: int) -> None:
        """Raise unless ``num_models`` is an int from 1 to ``self.num_models``."""
        if not isinstance(num_models, int) or isinstance(num_models, bool):
            raise TypeError(f"num_models must be an int, got {num_models!r}")
        if not 1 <= num_models <= self.num_models:
            raise ValueError(f"num_models must lie between 1 and {self.num_models}, got {num_models}")

    def ancestor(self, leaf: int, level: int) -> int:
        """The node of ``level`` (a block, or ``num_blocks`` for the heads) that ``leaf`` (from 0) runs through."""
        return leaf * self.levels[level] // self.num_models

    def nodes(self, leaves: slice, first: int = 0) -> list[tuple[slice, int]]:
        """The nodes that some leaves run through, for each level from ``first`` on.

        Args:
            leaves: The first n leaves, ``slice(0, n)``, or a single leaf, ``slice(n, n + 1)``.
            first: The first level wanted.

        Returns:
            For each level the range of nodes, and the number of them per node of the level above (the last of those
            may have fewer).
        """
        found = []
        for level, children in enumerate(self.replication[first:], first):
            nodes = slice(self.ancestor(leaves.start, level), self.ancestor(leaves.stop - 1, level) + 1)
            found.append((nodes, 1 if nodes.stop - nodes.start == 1 else children))
        return found

    def first_new(self, leaf: int) -> int:
        """The first level at which the paths of ``leaf`` (from 0) and the leaf before it differ. Anytime inference
        computes this level and those after it; it has the earlier ones already."""
        return self._first_new[leaf]

    @cached_property
    def _first_new(self) -> tuple[int, ...]:
        paths = [[self.ancestor(leaf, level) for level in range(len(self.levels))] for leaf in range(self.num_models)]
        differ = ([a != b for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(paths))
        return 0, *(levels.index(True) for levels in differ)


def _at_least_one(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
