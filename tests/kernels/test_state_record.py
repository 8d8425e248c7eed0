"""The record of modules and tensors: what it notices, and that it keeps and frees Python's objects as it should."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch

import hne_kernels as K


def record(*containers: Any, ignored: tuple[str, ...] = (), tensors: tuple[torch.Tensor, ...] = ()) -> K.StateRecord:
    sizes = [tensor.nbytes for tensor in tensors]
    return K.StateRecord(containers, [frozenset(ignored)] * len(containers), tensors, sizes)


def test_entries_of_dictionaries_and_lists() -> None:
    table, items = {"a": object(), "b": object(), "free": 1}, [object(), object()]
    unchanged = record(table, items, ignored=("free",)).unchanged
    table["free"] = 2
    assert unchanged()
    before, table["b"] = table["b"], object()
    assert not unchanged()
    table["b"] = before
    assert unchanged()
    items.append(None)
    assert not unchanged()
    items.pop()
    assert unchanged()
    del table["a"]
    assert not unchanged()


def test_tensors() -> None:
    first, second = torch.randn(5), torch.randn(1000)
    unchanged = record(tensors=(first, second)).unchanged
    assert unchanged()
    second.data[0] += 1  # no new version, but another memory
    assert not unchanged()
    second.data[0] -= 1
    unchanged = record(tensors=(first, second)).unchanged
    second.add_(0)  # a new version
    assert not unchanged()
    unchanged = record(tensors=(first, second)).unchanged
    first.data = first.clone()  # another address
    assert not unchanged()


def test_a_tensor_without_version_counter_is_never_unchanged() -> None:
    with torch.inference_mode():
        tensor = torch.randn(3)
    assert not record(tensors=(tensor,)).unchanged()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([{}], [], [], []), ValueError, "ignored: expected as many as containers"),
        (([], [], [torch.ones(1)], []), ValueError, "sizes: expected as many as tensors"),
        (([()], [()], [], []), TypeError, "containers: expected dictionaries and lists"),
        (([{"a": 1}], [3], [], []), TypeError, "not iterable|not a container"),
        (([], [], [3], [4]), TypeError, "int"),
        (([], [], [torch.ones(1)], [-1]), OverflowError, "negative"),
        (([], [], [torch.ones(1)], ["4"]), TypeError, "int"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        K.StateRecord(*arguments)


def test_the_library_takes_lists_only() -> None:
    library = K.extension.cpu_library()
    with pytest.raises(TypeError, match="list"):
        library.StateRecord((), [], [], [])
    with pytest.raises(TypeError, match="argument"):
        library.StateRecord([])


def test_objects_live_as_long_as_the_record() -> None:
    table = {"key": torch.ones(1)}
    tensor = torch.ones(2)

    def counts() -> list[int]:
        return [sys.getrefcount(table), sys.getrefcount(table["key"]), sys.getrefcount(tensor)]

    before = counts()
    kept = [record(table, tensors=(tensor,)) for _ in range(5)]
    assert counts() == [count + 5 for count in before]
    for _ in range(5):
        with pytest.raises(ValueError, match="sizes"):
            K.StateRecord([table], [()], [tensor], [])
        assert kept[0].unchanged()
    del kept
    assert counts() == before


def test_a_cycle_through_a_record_is_collected() -> None:
    class Owner:
        pass

    owner = Owner()
    owner.record = record(owner.__dict__)  # type: ignore[attr-defined]
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None
