"""One comparison: do both sides agree, then how long does each take, measured turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import hne_kernels as K

Side = Callable[[], Any]

TOLERANCE = 1e-4  # of the largest value: float32 rounding, summed up over a network


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    shape: str
    fused_ms: float
    naive_ms: float
    images_per_s: float
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times as fast as naive."""
        return self.naive_ms / self.fused_ms

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, Sequence) else []


def check_agreement(fused: Any, naive: Any) -> None:
    """Raise unless both results are the same up to ``TOLERANCE`` times their largest value."""
    pairs = list(zip(tensors(fused), tensors(naive), strict=True))
    assert pairs, "nothing to compare"
    for number, (got, want) in enumerate(pairs):
        assert got.shape == want.shape, f"result {number}: shape {tuple(got.shape)}, naive {tuple(want.shape)}"
        error = (got.double() - want.double()).abs().max().item()
        scale = want.double().abs().max().item()
        assert error <= TOLERANCE * scale, (
            f"result {number}: fused and naive differ by {error:.3g}, more than "
            f"{TOLERANCE:g} of the largest value {scale:.3g}"
        )


def _seconds(side: Side, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        side()
    return (time.perf_counter() - start) / calls


def compare(
    benchmark: BenchmarkFixture,
    fused: Side,
    naive: Side,
    *,
    name: str,
    shape: str,
    images: int,
    seconds: float | None,
) -> Row | None:
    """Check that both sides agree and time them alternately, for about ``seconds`` in all.

    A round is as many calls of fused as take at least 5 ms, then as many of naive: what else the machine does
    falls on both alike. pytest-benchmark keeps the rounds of fused; naive goes to its ``extra_info``.

    Args:
        fused, naive: what to time; the results are compared first. Naive is called with the reference backend.
        name, shape: of the row.
        images: that one call handles, for the throughput.
        seconds: None for a single round, which shows only that everything runs.

    Returns:
        What was measured; None with ``--benchmark-disable``.

    Raises:
        AssertionError: the results differ.
    """
    with K.use_backend("reference"):
        right = naive()
    check_agreement(fused(), right)
    del right
    calls, rounds = 1, 1
    if seconds is not None:
        fused_seconds = _seconds(fused, 1)
        with K.use_backend("reference"):
            both = fused_seconds + _seconds(naive, 1)
        calls = max(1, round(0.005 / fused_seconds))
        rounds = max(3, min(100, round(seconds / (calls * both))))
    turns: list[float] = []

    def naive_turn() -> None:
        with K.use_backend("reference"):
            turns.append(_seconds(naive, calls))

    benchmark.pedantic(fused, teardown=naive_turn, rounds=rounds, iterations=calls)
    if benchmark.disabled:
        return None
    fused_ms = benchmark.stats.stats.median * 1e3
    row = Row(name, shape, fused_ms, median(turns[:rounds]) * 1e3, images / fused_ms * 1e3, rounds)
    benchmark.extra_info.update(row.record())
    return row
