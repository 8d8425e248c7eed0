"""Meters: timing on the host and on a GPU, and the measured rates of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cuda_graphs import emulate

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def test_meter_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated graphs, streams and events: the meter overwrites the cache, then times a replay."""
    from meters import GpuMeter

    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    emulate(monkeypatch)
    for name, stand_in in {
        "Event": Event,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    meter = GpuMeter(torch.device("cpu"))
    monkeypatch.setattr(meter, "_flush_buffer", SimpleNamespace(zero_=lambda: happened.append("flush")))
    x = torch.ones(3)
    calls = []

    def side() -> torch.Tensor:
        calls.append(1)
        return x * 2

    with meter.running():
        replay = meter.prepare(side)
        assert len(calls) == GpuMeter.WARM_UPS + 1
        x.fill_(5)
        assert replay().tolist() == [10, 10, 10]
        assert meter.seconds(replay, 2) == 0.003
    assert len(calls) == GpuMeter.WARM_UPS + 1, "a replay does not call the side"
    assert happened == ["flush", "event", "event"] * 2


def test_rates_are_measured() -> None:
    import roofline
    from meters import HostMeter

    rates = roofline.measure(HostMeter(), torch.device("cpu"), torch.float32, megabytes=1, sizes=(16, 32))
    assert 0 < rates.bytes_per_s < 1e13
    assert 0 < rates.flops_per_s < 1e15
    assert str(roofline.Rates(2e9, 3e9)) == "3 GFLOP/s, 2 GB/s copied"
    assert str(roofline.Rates(float("inf"), 3e9)) == "3 GFLOP/s"
    assert roofline.Work(bytes=8, flops=6).floor_seconds(roofline.Rates(float("inf"), 3)) == 2


def test_a_turn_begins_with_calls_that_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from meters import HostMeter

    now, happened = [0.0], []

    def side() -> None:
        happened.append("call")
        now[0] += HostMeter.WARM_UP * 0.4

    monkeypatch.setattr("time.sleep", lambda seconds: happened.append("rest"))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert HostMeter().seconds(side, 2) == pytest.approx(HostMeter.WARM_UP * 0.4)
    assert happened == ["rest", *["call"] * (3 + 2)]
    happened.clear()
    assert HostMeter().seconds(side, 1, warm=False) == pytest.approx(HostMeter.WARM_UP * 0.4)
    assert happened == ["rest", "call"]


def test_percentiles() -> None:
    from meters import percentile

    values = [float(value) for value in range(1, 201)]
    assert [percentile(values[::-1], p) for p in (0, 50, 99, 100)] == [1, 100, 198, 200]
    assert percentile([7.0], 99) == 7
