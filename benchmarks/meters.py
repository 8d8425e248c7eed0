"""Timing of calls, by the clock of the host or by events on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from math import ceil
from statistics import fmean
from typing import Any, Protocol

import torch

Side = Callable[[], Any]


class Meter(Protocol):
    """Times the sides of a comparison.

    Attributes:
        turn: intended length of a side's turn, in seconds.
        before_turn: preparation before each turn, in seconds.
    """

    turn: float
    before_turn: float

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Context for a whole comparison, creation of its inputs included."""

    def prepare(self, side: Side) -> Side:
        """Warm up a side, and return the call to time; it has the same result."""

    def seconds(self, side: Side, calls: int, *, warm: bool = True) -> float:
        """Mean time of a call, after warm-up calls if ``warm``."""

    def works(self) -> bool:
        """Whether the device still computes."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least ``percent`` of all values do not exceed."""
    return sorted(values)[max(0, ceil(percent / 100 * len(values)) - 1)]


class HostMeter:
    """Times calls that have finished when they return.

    Idle threads spin for a while before they sleep (libgomp's for 6 ms) and would take a core from the next side, so
    each turn begins with a rest. Untimed calls then wake the threads of this side and bring its weights into the cache.
    """

    REST, WARM_UP = 0.02, 0.01
    turn, before_turn = 0.05, REST + WARM_UP

    def running(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def prepare(self, side: Side) -> Side:
        return side

    def seconds(self, side: Side, calls: int, *, warm: bool = True) -> float:
        time.sleep(self.REST)
        ready = time.perf_counter() + self.WARM_UP
        while warm and time.perf_counter() < ready:
            side()
        start = time.perf_counter()
        for _ in range(calls):
            side()
        return (time.perf_counter() - start) / calls

    def works(self) -> bool:
        return True


class GpuMeter:
    """Times kernels on a GPU by events around the replay of a CUDA graph.

    The graph removes the cost of launches from every side. The L2 cache is overwritten before each replay.
    """

    WARM_UPS = 3
    turn, before_turn = 0.005, 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self._pool: Any = None

    @contextlib.contextmanager
    def running(self) -> Any:
        # A backward pass runs on the stream of its forward pass, so one stream does everything, capture included.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # The graphs of a comparison are replayed one after the other, so they share their memory.
            self._pool = torch.cuda.graph_pool_handle()
            yield
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def prepare(self, side: Side) -> Side:
        for _ in range(self.WARM_UPS):
            side()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream):
            result = side()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def seconds(self, side: Side, calls: int, *, warm: bool = True) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self._flush_buffer.zero_()
            start.record()
            side()
            end.record()
        torch.cuda.synchronize(self._device)
        return fmean(start.elapsed_time(end) for start, end in events) / 1e3

    def works(self) -> bool:
        """False after an illegal memory access, for example: no later call of this process succeeds then."""
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True
