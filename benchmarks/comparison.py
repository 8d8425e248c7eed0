"""One comparison: do all sides agree, then how long does each take, measured turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, TypedDict

import torch
from meters import Meter, Side
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

# By precision: how far results may be apart by rounding, summed up over a network. In float32 it is the largest
# difference, as a part of the largest value; else the norm of all differences, as a part of that of all values: where
# rounding turns a ReLU on or off, a single gradient may differ by any amount.
# A training step normalises by its own batch: its logits in bfloat16 are 8e-2 from those in float32 by either way.
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "tf32 training": 5e-2, "bfloat16 training": 0.15}
EAGER = "eager"


class Case(TypedDict, total=False):
    """What a row of a model is of, for the tables and plots that are made from several rows."""

    network: str
    num_models: int
    batch: int
    dtype: str
    macs: int  # multiply-adds of an image


@dataclass(frozen=True)
class Row:
    """A line of the table: a fused side, and those it is compared with."""

    name: str
    shape: str
    fused_ms: float
    naive_ms: float
    images_per_s: float
    rounds: int
    backend: str = ""  # of the fused side; "" for the one that is chosen automatically
    others_ms: dict[str, float] = field(default_factory=dict)  # naive by other means, and other engines
    floor_ms: float | None = None  # no side is faster, see roofline.py
    case: Case = field(default_factory=Case)
    memory_mib: dict[str, float] = field(default_factory=dict)  # of a call at its peak, by side

    @property
    def ratio(self) -> float:
        """How many times as fast as the fastest other side."""
        return min(self.naive_ms, *self.others_ms.values(), float("inf")) / self.fused_ms

    @property
    def of_peak(self) -> float | None:
        """Share of the time that cannot be saved."""
        return None if self.floor_ms is None else self.floor_ms / self.fused_ms

    def record(self) -> dict[str, Any]:
        record = {**asdict(self), "ratio": self.ratio, "of_peak": self.of_peak}
        return {name: value for name, value in record.items() if value not in ("", {}, None)}


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, Sequence) else []


def check_agreement(fused: Any, naive: Any, precision: str = "float32") -> None:
    """Raise unless both results are the same up to the ``TOLERANCES`` of ``precision``."""
    tolerance, order = TOLERANCES[precision], float("inf") if precision == "float32" else 2
    pairs = list(zip(tensors(fused), tensors(naive), strict=True))
    assert pairs, "nothing to compare"
    for number, (got, want) in enumerate(pairs):
        assert got.shape == want.shape, f"result {number}: shape {tuple(got.shape)}, naive {tuple(want.shape)}"
        error, scale = (torch.linalg.vector_norm(t.double(), order).item() for t in (got.double() - want, want))
        assert error <= tolerance * scale, (
            f"result {number}: fused and naive differ by {error:.3g}, more than {tolerance:g} of {scale:.3g}"
        )


class Watch:
    """What pytest-benchmark takes for its clock: it goes on by what was measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _seconds_of_a_call(side: Side, meter: Meter) -> float:
    """Once it is warm, which it is not in the call that shows how many a turn may have."""
    first = meter.seconds(side, 1, warm=False)
    return first if _is_long(first, meter) else meter.seconds(side, max(1, int(meter.turn / first)))


def _is_long(seconds: float, meter: Meter) -> bool:
    """So long a call would not be quicker for another one before it."""
    return seconds >= 10 * meter.turn


def compare(
    benchmark: BenchmarkFixture,
    fused: Mapping[str, Side],
    naive: Mapping[str, Side],
    *,
    meter: Meter,
    watch: Watch,
    name: str,
    shape: str,
    images: int,
    precision: str,
    floor_ms: float | None,
    seconds: float | None,
    case: Case | None = None,
    memory_mib: Callable[[], dict[str, float]] = dict,
) -> list[Row]:
    """Check that all sides agree and time them alternately, for about ``seconds`` in all.

    In a round, one side after the other has a turn of the meter, with as many calls as it manages in that time: what
    else the machine does falls on all alike. pytest-benchmark keeps the rounds of the first fused side; its
    ``extra_info`` has the rest.

    Args:
        benchmark: Takes ``watch`` for its clock.
        fused: What to time, by backend.
        naive: What to compare with, by name; the results of all others are compared with those of ``naive`` first. The
            one called ``eager`` is timed as it is launched from Python, without preparation.
        meter: Times the sides.
        name, shape: Of the rows.
        images: That one call handles, for the throughput.
        precision: Of :func:`check_agreement`.
        floor_ms: Of the rows.
        seconds: None for a single round, which shows only that everything runs.
        case: Of the rows.
        memory_mib: Tells that of the rows, once all is timed.

    Returns:
        A row for each fused side; none with ``--benchmark-disable``.

    Raises:
        AssertionError: The results differ.
    """
    sides = [*naive.items(), *fused.items()]
    ready = {side: call if side == EAGER else meter.prepare(call) for side, call in sides}
    right = ready["naive"]()
    for side, call in ready.items():
        if side != "naive":
            try:
                check_agreement(call(), right, precision)
            except AssertionError as error:
                raise AssertionError(f"{side or 'fused'}: {error}") from None
    del right
    calls, long, rounds = dict.fromkeys(ready, 1), dict.fromkeys(ready, True), 1
    if seconds is not None:
        taken = {side: _seconds_of_a_call(call, meter) for side, call in ready.items()}
        calls = {side: max(1, round(meter.turn / once)) for side, once in taken.items()}
        long = {side: _is_long(once, meter) for side, once in taken.items()}
        of_a_round = sum(calls[side] * once + meter.before_turn for side, once in taken.items())
        rounds = max(3, min(100, round(seconds / of_a_round)))
    turns: dict[str, list[float]] = {side: [] for side in ready}

    def turn(side: str) -> None:
        turns[side].append(meter.seconds(ready[side], calls[side], warm=not long[side]))

    def first_turn() -> None:
        turn(leader)
        watch.now += turns[leader][-1]

    def other_turns() -> None:
        for side in ready:
            if side != leader:
                turn(side)

    leader = next(iter(fused))
    benchmark.pedantic(first_turn, teardown=other_turns, rounds=rounds)
    if benchmark.disabled:
        return []
    ms = {side: median(of_side) * 1e3 for side, of_side in turns.items()}
    others = {side: ms[side] for side in naive if side != "naive"}
    shared = {"others_ms": others, "floor_ms": floor_ms, "case": case or {}, "memory_mib": memory_mib()}
    rows = [Row(name, shape, ms[side], ms["naive"], images / ms[side] * 1e3, rounds, side, **shared) for side in fused]
    for row in rows:
        benchmark.extra_info |= row.record() if row.backend == leader else {row.backend: row.record()}
    return rows
