"""The tree of an ensemble: branches per block, and the path of each leaf through them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, init=False)
class Hierarchy:
    """A tree: branches per block of a network, and leaves, one per model.

    Block ``b`` exists in ``branches[b]`` independent copies. Leaf ``n`` runs through copy
    ``n * branches[b] // num_models`` of block ``b``. That order is depth first, so the first ``n`` leaves need
    the *first* ``ceil(n * branches[b] / num_models)`` copies: a smaller ensemble is a leading slice of every weight.

    One description covers the paper's systems, and the student of Hydra::

        Hierarchy((1, 2, 4, 8, 16))               hierarchical: HNE               Hierarchy.doubling(5, 16)
        Hierarchy((16, 16, 16, 16, 16))           independent networks            Hierarchy.independent(5, 16)
        Hierarchy((1, 1, 1, 16, 16))              shared trunk, then independent  Hierarchy.multi_branch(5, 16, 3)
        Hierarchy((1, 1, 1, 1, 1), num_models=16) only the heads branch: Hydra    Hierarchy.multi_head(5, 16)
        Hierarchy((1, 1, 1, 1, 1))                one network                     Hierarchy.single(5)

    Args:
        branches: Copies of each block; each count divides the next.
        num_models: Leaves, a multiple of the last count; the last count itself by default. With a larger number,
            several heads share a copy of the last block.

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
        """The paper's tree: branches double from block to block, and the first blocks are shared where there are
        more blocks than doublings. ``num_models`` (default ``2 ** (num_blocks - 1)``) is a power of two."""
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
        """Nodes of the tree at each level: the branches of every block, then the leaves (one head each)."""
        return (*self.branches, self.num_models)

    @cached_property
    def replication(self) -> tuple[int, ...]:
        """Children per node of the level above, for each level: how often features are replicated on entering each
        block, and the heads. The input image is the single node above block 0."""
        levels = self.levels
        return tuple(b // a for a, b in zip((1, *levels), levels, strict=False))

    def needed(self, num_models: int) -> tuple[int, ...]:
        """Number of (leading) nodes of each level that the first ``num_models`` leaves run through; the last entry, of
        the heads, is ``num_models`` itself.

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
        """The nodes that ``leaves`` run through at each level from ``first`` on, and how many of them each node of the
        level above has (the last may have fewer). ``leaves`` are the first ones, or a single one."""
        found = []
        for level, children in enumerate(self.replication[first:], first):
            nodes = slice(self.ancestor(leaves.start, level), self.ancestor(leaves.stop - 1, level) + 1)
            found.append((nodes, 1 if nodes.stop - nodes.start == 1 else children))
        return found

    def first_new(self, leaf: int) -> int:
        """The first level at which the paths of ``leaf`` (from 0) and the leaf before it differ. Anytime inference
        computes the levels from there on."""
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
