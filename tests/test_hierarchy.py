"""The tree: the path of each leaf, and the branches that the first n leaves need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hne import Hierarchy


@st.composite
def trees(draw: st.DrawFn) -> Hierarchy:
    """Trees with up to 5 blocks and 48 leaves."""
    factors = draw(st.lists(st.sampled_from((1, 1, 2, 2, 3)), min_size=2, max_size=6))
    levels, count = [], 1
    for factor in factors:
        count = count * factor if count * factor <= 48 else count
        levels.append(count)
    return Hierarchy(levels[:-1], levels[-1])


@given(trees())
def test_needed_branches_are_the_ancestors_of_the_first_leaves(tree: Hierarchy) -> None:
    for n in range(1, tree.num_models + 1):
        for level, count in enumerate(tree.needed(n)):
            assert {tree.ancestor(leaf, level) for leaf in range(n)} == set(range(count))


@given(trees())
def test_first_new_is_the_first_level_with_a_new_node(tree: Hierarchy) -> None:
    seen: set[tuple[int, int]] = set()
    for leaf in range(tree.num_models):
        path = [(level, tree.ancestor(leaf, level)) for level in range(tree.num_blocks + 1)]
        first = tree.first_new(leaf)
        assert seen.issuperset(path[:first])
        assert seen.isdisjoint(path[first:])
        seen.update(path)
    assert len(seen) == sum(tree.levels)


@given(trees())
def test_replication_is_the_number_of_children(tree: Hierarchy) -> None:
    assert len(tree.replication) == tree.num_blocks + 1
    parents = 1
    for level, (replicate, count) in enumerate(zip(tree.replication, tree.levels, strict=True)):
        assert parents * replicate == count
        for leaf in range(tree.num_models if level else 0):
            assert tree.ancestor(leaf, level) // replicate == tree.ancestor(leaf, level - 1)
        parents = count


def test_named_trees() -> None:
    assert Hierarchy.doubling(5) == Hierarchy.doubling(5, 16) == Hierarchy((1, 2, 4, 8, 16))
    assert Hierarchy.doubling(5, 4) == Hierarchy((1, 1, 1, 2, 4))
    assert Hierarchy.independent(3, 6) == Hierarchy((6, 6, 6))
    assert Hierarchy.multi_branch(5, 16, shared=3) == Hierarchy((1, 1, 1, 16, 16))
    assert Hierarchy.multi_head(2, 5) == Hierarchy((1, 1), num_models=5)
    assert Hierarchy.single(3) == Hierarchy((1, 1, 1))
    assert Hierarchy([2, 4]).num_models == 4
    assert hash(Hierarchy([2, 4])) == hash(Hierarchy((2, 4), 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hierarchy(()), ValueError, r"at least one block, got \(\)"),
        (lambda: Hierarchy((1, 0)), ValueError, "at least 1, got 0"),
        (lambda: Hierarchy((1, 2.0)), TypeError, r"must be ints, got 2\.0"),
        (lambda: Hierarchy((1, True)), TypeError, "must be ints, got True"),
        (lambda: Hierarchy((1, 2, 3)), ValueError, r"branches\[1\] = 2 does not divide branches\[2\] = 3"),
        (lambda: Hierarchy((1, 2), 3), ValueError, r"branches\[1\] = 2 does not divide num_models = 3"),
        (lambda: Hierarchy((1, 4), 2), ValueError, "does not divide num_models = 2"),
        (lambda: Hierarchy.doubling(5, 32), ValueError, "of 5 blocks has a power of two of at most 16"),
        (lambda: Hierarchy.doubling(5, 6), ValueError, "got num_models = 6"),
        (lambda: Hierarchy.doubling(0), ValueError, "num_blocks must be at least 1, got 0"),
        (lambda: Hierarchy.doubling(2.5), TypeError, r"num_blocks must be an int, got 2\.5"),
        (lambda: Hierarchy.multi_branch(3, 4, 0), ValueError, "shared must lie between 1 and num_blocks = 3, got 0"),
        (lambda: Hierarchy((1, 2)).needed(0), ValueError, "num_models must lie between 1 and 2, got 0"),
        (lambda: Hierarchy((1, 2)).needed(3), ValueError, "num_models must lie between 1 and 2, got 3"),
        (lambda: Hierarchy((1, 2)).needed(1.5), TypeError, r"num_models must be an int, got 1\.5"),
    ],
)
def test_bad_arguments_are_explained(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
