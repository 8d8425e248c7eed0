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

        def works(self) -> bool:
            return True

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


class _StandIn:
    """A meter for which each call takes a second."""

    turn, before_turn, usable = 0.05, 0.0, True

    def prepare(self, call: Any) -> Any:
        return call

    def seconds(self, call: Any, calls: int, *, warm: bool = True) -> float:
        return 1.0

    def works(self) -> bool:
        return self.usable


def _compare(fused: dict[str, Any], naive: dict[str, Any], meter: _StandIn, **options: Any) -> list[Any]:
    from comparison import Watch, compare

    benchmark: Any = SimpleNamespace(
        pedantic=lambda target, teardown, rounds: (target(), teardown()), disabled=False, extra_info={}
    )
    return compare(
        benchmark, fused, naive, meter=meter, watch=Watch(), name="op", shape="1", images=1, precision="float32",
        floor_ms=None, seconds=None, **options,
    )  # fmt: skip


def _right() -> torch.Tensor:
    return torch.ones(2)


def _wrong() -> torch.Tensor:
    return torch.zeros(2)


def _broken() -> torch.Tensor:
    raise ValueError("no\nkernel")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_failing_side_costs_its_own_cell(one_by_one: bool) -> None:
    fused = {"cuda": _broken, "triton": _right, "other": _wrong}
    naive = {"naive": _right, "eager": _right, "compiled": _broken}
    groups = [[name] for name in (*naive, *fused)] if one_by_one else ()
    reports: list[list[Any]] = []
    rows = {row.backend: row for row in _compare(fused, naive, _StandIn(), groups=groups, report=reports.append)}
    assert rows["triton"].fused_ms == rows["triton"].naive_ms == 1000
    assert rows["triton"].others_ms == {"eager": 1000}
    assert rows["triton"].ratio == 1
    assert rows["cuda"].fused_ms != rows["cuda"].fused_ms, "NaN"
    assert rows["cuda"].failed["cuda"] == rows["cuda"].failed["compiled"] == "ValueError: no kernel"
    assert rows["cuda"].failed["other"].startswith("AssertionError: result 0: fused and naive differ by 1")
    assert rows["cuda"].naive_ms == 1000
    assert len(reports) == len(groups or [1]) + 1, "after each group, and at the end"
    if one_by_one:
        assert [set(rows[0].others_ms) for rows in reports[:2]] == [set(), {"eager"}]


def test_without_the_naive_side_the_others_are_compared() -> None:
    (row,) = _compare({"cuda": _right}, {"naive": _broken, "eager": _right}, _StandIn())
    assert (row.fused_ms, row.others_ms, row.ratio) == (1000, {"eager": 1000}, 1)
    assert set(row.failed) == {"naive"}


def test_a_lost_device_ends_the_run_with_the_rows_so_far() -> None:
    from comparison import LostDevice

    meter, reports = _StandIn(), []

    def loses() -> torch.Tensor:
        meter.usable = False
        raise RuntimeError("illegal memory access")

    with pytest.raises(LostDevice, match="cuda"):
        _compare(
            {"cuda": loses}, {"naive": _right, "compiled": _right}, meter,
            groups=[["naive"], ["cuda"], ["compiled"]], report=reports.append,
        )  # fmt: skip
    assert reports[-1][0].naive_ms == 1000
    assert reports[-1][0].failed == {"cuda": "RuntimeError: illegal memory access"}


def test_on_a_gpu_compiled_sides_come_last() -> None:
    from workload import CPU, GPU

    peers, fused = ["naive", "eager", "compiled", "channels_last", "frozen"], ["cuda", "triton"]
    assert GPU.groups(peers, fused) == [
        ["naive"], ["eager"], ["channels_last"], ["cuda"], ["triton"], ["compiled"], ["frozen"],
    ]  # fmt: skip
    assert CPU.groups(peers, fused) == [[*peers, *fused]]
