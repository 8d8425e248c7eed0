"""Comparisons: agreement of the sides, and their turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def test_sides_that_disagree_are_not_timed() -> None:
    from comparison import check_agreement

    right = torch.tensor([1000.0, 1.0])
    check_agreement((right + 0.05, right), (right, right))
    with pytest.raises(AssertionError, match=r"result 1: fused and naive differ by 0\.2"):
        check_agreement((right, right + 0.2), (right, right))
    with pytest.raises(AssertionError, match="differ by nan"):
        check_agreement(right * float("nan"), right)
    with pytest.raises(AssertionError, match="shape"):
        check_agreement(right[:1], right)
    check_agreement(right * 1.04, right, "bfloat16")
    with pytest.raises(AssertionError, match=r"more than 0\.05 of"):
        check_agreement(right * 1.06, right, "bfloat16")


def test_turns_take_as_long_for_every_side() -> None:
    from comparison import Watch, compare

    seconds = {"fused": 0.01, "naive": 1.0, "quick": 0.0001}
    turns: list[tuple[str, int, bool]] = []

    class Meter:
        turn, before_turn = 0.05, 0.03

        def prepare(self, call: Any) -> Any:
            return call

        def seconds(self, call: Any, calls: int, *, warm: bool = True) -> float:
            name = call.__name__
            turns.append((name, calls, warm))
            return seconds[name] + (0 if warm else 0.1)  # a first call is slow

    def side(name: str) -> Any:
        def call() -> torch.Tensor:
            return torch.ones(2)

        call.__name__ = name
        return call

    def pedantic(target: Any, teardown: Any, rounds: int) -> None:
        for _ in range(rounds):
            target()
            teardown()

    benchmark: Any = SimpleNamespace(pedantic=pedantic, disabled=False, extra_info={})
    meter: Any = Meter()
    naive = {"naive": side("naive"), "quick": side("quick")}
    (row,) = compare(
        benchmark, {"": side("fused")}, naive, meter=meter, watch=Watch(), name="", shape="", images=1,
        precision="float32", floor_ms=None, seconds=6.45,
    )  # fmt: skip
    assert row.rounds == 5, "6.45 s at 50 + 1100 + 50 ms and three times 30 ms a round"
    assert turns[-3:] == [("fused", 5, True), ("naive", 1, False), ("quick", 500, True)]
    assert row.fused_ms == pytest.approx(10)
    assert row.others_ms == pytest.approx({"quick": 0.1})
