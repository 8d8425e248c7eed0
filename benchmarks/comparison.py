"""One comparison: check that all sides agree, then time them, alternately or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from statistics import median
from typing import Any, TypedDict

import torch
from meters import Meter, Side
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

# Largest relative difference between two sides that rounding explains, by precision. In float32 it compares the largest
# difference with the largest value. Else it compares the norms of differences and values, because rounding may turn a
# ReLU on or off, and a single gradient may then differ by any amount.
# A training step normalises by the statistics of its batch: on every side, its logits in bfloat16 differ by 8e-2 from
# those in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "tf32 training": 5e-2, "bfloat16 training": 0.15}
EAGER = "eager"


class Case(TypedDict, total=False):
    """The settings behind a row of a model, for tables and plots that combine several rows."""

    network: str
    num_models: int
    batch: int
    dtype: str
    macs: int  # multiply-adds for one image


@dataclass(frozen=True)
class Row:
    """A row of the table: a fused side and its peers. A time is NaN if the side failed or is not measured yet."""

    name: str
    shape: str
    fused_ms: float
    naive_ms: float
    images_per_s: float
    rounds: int
    backend: str = ""  # of the fused side; "" if it is chosen automatically
    others_ms: dict[str, float] = field(default_factory=dict)  # other peers: PyTorch in other ways, other engines
    floor_ms: float | None = None  # lower bound for any side, see roofline.py
    case: Case = field(default_factory=Case)
    memory_mib: dict[str, float] = field(default_factory=dict)  # peak memory of a call, by side
    p99_ms: dict[str, float] = field(default_factory=dict)  # 99th percentile of all calls, by side
    failed: dict[str, str] = field(default_factory=dict)  # reasons in one line, by side

    @property
    def ratio(self) -> float:
        """Speed relative to the fastest peer; above 1 the fused side is faster. NaN without a peer."""
        fastest = min((ms for ms in (self.naive_ms, *self.others_ms.values()) if isfinite(ms)), default=nan)
        return fastest / self.fused_ms

    @property
    def of_peak(self) -> float | None:
        """Lower bound over measured time, 0 to 1."""
        return None if self.floor_ms is None else self.floor_ms / self.fused_ms

    def record(self) -> dict[str, Any]:
        record = {**asdict(self), "ratio": self.ratio, "of_peak": self.of_peak}
        return {name: value for name, value in record.items() if value not in ("", {}, None) and value == value}


def tensors(result: Any) -> list[Tensor]:
    """List all tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, Sequence) else []


def check_agreement(fused: Any, naive: Any, precision: str = "float32") -> None:
    """Check that both results are equal up to the ``TOLERANCES`` of ``precision``.

    Raises:
        AssertionError: they differ.
    """
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
    """A clock for pytest-benchmark that advances by the measured times."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _seconds_per_call(side: Side, meter: Meter) -> float:
    """Time of a warm call. The first call, a cold one, tells how many calls fit into a turn."""
    first = meter.seconds(side, 1, warm=False)
    return first if _is_long(first, meter) else meter.seconds(side, max(1, int(meter.turn / first)))


def _is_long(seconds: float, meter: Meter) -> bool:
    """Whether a call takes so long that a warm-up call before it would change nothing."""
    return seconds >= 10 * meter.turn


class LostDevice(Exception):
    """A side has made the GPU unusable for this process; the message names the side."""


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
    groups: Sequence[Sequence[str]] = (),
    report: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Check that all sides agree and time them alternately, for about ``seconds`` in all.

    In a round each side has one turn, with as many calls as fit into the turn of the meter: other load of the machine
    affects all sides alike. pytest-benchmark stores the rounds of the first fused side; ``extra_info`` has the rest.

    A side that fails, or disagrees, costs its own cell: the reason is in ``Row.failed``.

    Args:
        benchmark: pytest-benchmark's fixture, with ``watch`` as its clock.
        fused: fused sides to time, by backend.
        naive: peers to compare with, by name. The results of all sides are first compared with those of the first side
            that works, normally the peer ``naive``. The peer ``eager`` is timed as launched from Python, without
            preparation by the meter.
        meter: times the sides.
        name, shape: of the rows.
        images: number of images per call, for the throughput.
        precision: see :func:`check_agreement`.
        floor_ms: of the rows.
        seconds: None for a single round, which only shows that everything runs.
        case: of the rows.
        memory_mib: measures the memory of the rows, after all timings.
        groups: names of the sides that are prepared and timed together; a group follows the other. By default one
            group has all sides.
        report: called with the rows so far after each group.

    Returns:
        A row for each fused side; none with ``--benchmark-disable``.

    Raises:
        LostDevice: a side has made the GPU unusable; the rows were reported.
    """
    sides = {**naive, **fused}
    comparison = _Comparison(sides, meter, precision)
    rounds, used = 1, False

    def rows(memory: dict[str, float]) -> list[Row]:
        ms = comparison.ms
        others = {side: ms[side] for side in naive if side != "naive" and side in ms}
        shared = {"others_ms": others, "floor_ms": floor_ms, "case": case or {}, "memory_mib": memory}
        shared["failed"] = dict(comparison.failed)
        return [
            Row(name, shape, of, ms.get("naive", nan), images / of * 1e3, rounds, side, **shared)  # type: ignore[arg-type]
            for side, of in ((side, ms.get(side, nan)) for side in fused)
        ]

    for group in groups or [list(sides)]:
        ready = comparison.prepare(group)
        leader = next((side for side in ready if side in fused), None)
        try:
            turns = _Turns(ready, meter, None if seconds is None else seconds * len(group) / len(sides))
            if leader is not None and not used:  # the fixture may be used once
                rounds, used = turns.rounds, True
                turns.run_in(benchmark, leader, watch)
            elif not benchmark.disabled:
                turns.run()
            comparison.ms |= {} if benchmark.disabled else turns.milliseconds()
        except Exception as error:
            if len(group) > 1:  # it is not known whose turn it was
                raise
            comparison.failed[group[0]] = _reason(error)
        if benchmark.disabled:
            continue
        report(rows({}))
        if comparison.failed and not meter.works():
            raise LostDevice(next(reversed(comparison.failed)))
    if benchmark.disabled:
        return []
    result = rows(memory_mib())
    report(result)
    for row in result:
        benchmark.extra_info |= row.record() if row.backend == next(iter(fused)) else {row.backend: row.record()}
    return result


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class _Comparison:
    """Results that all sides are compared with, times, and reasons of failures."""

    def __init__(self, sides: Mapping[str, Side], meter: Meter, precision: str) -> None:
        self.ms: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._sides, self._meter, self._precision = dict(sides), meter, precision
        self._expected: list[Tensor] | None = None

    def prepare(self, group: Sequence[str]) -> dict[str, Side]:
        """Prepare the sides of a group for their turns; those that fail or disagree are left out."""
        ready = {}
        for side in group:
            call = self._sides.pop(side)  # with the side goes its memory
            try:
                call = call if side == EAGER else self._meter.prepare(call)
                result = call()
                if self._expected is None:
                    self._expected = [tensor.clone() for tensor in tensors(result)]
                else:
                    check_agreement(result, self._expected, self._precision)
                ready[side] = call
            except Exception as error:
                self.failed[side] = _reason(error)
        return ready


class _Turns:
    """Alternating turns of the sides of a group."""

    def __init__(self, ready: Mapping[str, Side], meter: Meter, seconds: float | None) -> None:
        self._ready, self._meter = dict(ready), meter
        self._turns: dict[str, list[float]] = {side: [] for side in ready}
        self._calls, self._long, self.rounds = dict.fromkeys(ready, 1), dict.fromkeys(ready, True), 1
        if seconds is not None and ready:
            per_call = {side: _seconds_per_call(call, meter) for side, call in ready.items()}
            self._calls = {side: max(1, round(meter.turn / once)) for side, once in per_call.items()}
            self._long = {side: _is_long(once, meter) for side, once in per_call.items()}
            per_round = sum(self._calls[side] * once + meter.before_turn for side, once in per_call.items())
            self.rounds = max(3, min(100, round(seconds / per_round)))

    def run_in(self, benchmark: BenchmarkFixture, leader: str, watch: Watch) -> None:
        """All rounds, with the turns of ``leader`` as those of the benchmark."""

        def first_turn() -> None:
            self._turn(leader)
            watch.now += self._turns[leader][-1]

        def other_turns() -> None:
            for side in self._ready:
                if side != leader:
                    self._turn(side)

        benchmark.pedantic(first_turn, teardown=other_turns, rounds=self.rounds)

    def run(self) -> None:
        for _ in range(self.rounds):
            for side in self._ready:
                self._turn(side)

    def _turn(self, side: str) -> None:
        call, calls = self._ready[side], self._calls[side]
        self._turns[side].append(self._meter.seconds(call, calls, warm=not self._long[side]))

    def milliseconds(self) -> dict[str, float]:
        return {side: median(seconds) * 1e3 for side, seconds in self._turns.items()}
