"""One comparison: check that all sides agree, then time them alternately."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
    """A row of the table: a fused side and its peers."""

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

    @property
    def ratio(self) -> float:
        """Speed relative to the fastest peer; above 1 the fused side is faster."""
        return min(self.naive_ms, *self.others_ms.values(), float("inf")) / self.fused_ms

    @property
    def of_peak(self) -> float | None:
        """Lower bound over measured time, 0 to 1."""
        return None if self.floor_ms is None else self.floor_ms / self.fused_ms

    def record(self) -> dict[str, Any]:
        record = {**asdict(self), "ratio": self.ratio, "of_peak": self.of_peak}
        return {name: value for name, value in record.items() if value not in ("", {}, None)}


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

    In a round each side has one turn, with as many calls as fit into the turn of the meter: other load of the machine
    affects all sides alike. pytest-benchmark stores the rounds of the first fused side; ``extra_info`` has the rest.

    Args:
        benchmark: pytest-benchmark's fixture, with ``watch`` as its clock.
        fused: fused sides to time, by backend.
        naive: peers to compare with, by name. The results of all sides are first compared with those of the peer
            ``naive``. The peer ``eager`` is timed as launched from Python, without preparation by the meter.
        meter: times the sides.
        name, shape: of the rows.
        images: number of images per call, for the throughput.
        precision: see :func:`check_agreement`.
        floor_ms: of the rows.
        seconds: None for a single round, which only shows that everything runs.
        case: of the rows.
        memory_mib: measures the memory of the rows, after all timings.

    Returns:
        A row for each fused side; none with ``--benchmark-disable``.

    Raises:
        AssertionError: the results differ.
    """
    sides = [*naive.items(), *fused.items()]
    ready = {side: call if side == EAGER else meter.prepare(call) for side, call in sides}
    expected = ready["naive"]()
    for side, call in ready.items():
        if side != "naive":
            try:
                check_agreement(call(), expected, precision)
            except AssertionError as error:
                raise AssertionError(f"{side or 'fused'}: {error}") from None
    del expected
    calls, long, rounds = dict.fromkeys(ready, 1), dict.fromkeys(ready, True), 1
    if seconds is not None:
        per_call = {side: _seconds_per_call(call, meter) for side, call in ready.items()}
        calls = {side: max(1, round(meter.turn / once)) for side, once in per_call.items()}
        long = {side: _is_long(once, meter) for side, once in per_call.items()}
        per_round = sum(calls[side] * once + meter.before_turn for side, once in per_call.items())
        rounds = max(3, min(100, round(seconds / per_round)))
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
    ms = {side: median(seconds_per_turn) * 1e3 for side, seconds_per_turn in turns.items()}
    others = {side: ms[side] for side in naive if side != "naive"}
    shared = {"others_ms": others, "floor_ms": floor_ms, "case": case or {}, "memory_mib": memory_mib()}
    rows = [Row(name, shape, ms[side], ms["naive"], images / ms[side] * 1e3, rounds, side, **shared) for side in fused]
    for row in rows:
        benchmark.extra_info |= row.record() if row.backend == leader else {row.backend: row.record()}
    return rows
