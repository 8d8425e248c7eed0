"""How long a call takes: by the clock of the host, or by events on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any, Protocol

import torch

Side = Callable[[], Any]


class Meter(Protocol):
    """Times sides of a comparison.

    Attributes:
        turn: Seconds that a turn of a side is to take.
        before_turn: Seconds that pass before each turn.
    """

    turn: float
    before_turn: float

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Everything of a comparison happens in here, the making of its inputs included."""

    def prepare(self, side: Side) -> Side:
        """Warm up, and return what is to be timed: it gives the same result."""

    def seconds(self, side: Side, calls: int, *, warm: bool = True) -> float:
        """Mean time of a call; of a first one, if it is not to be ``warm``."""


class HostMeter:
    """For what is done when the call returns.

    Threads that have nothing to do spin for a while before they sleep (libgomp's for 6 ms), and would take a core from
    the side that comes next. So each turn begins with a rest. Then calls that are not timed wake the threads of this
    side and have its weights in the cache.
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


class GpuMeter:
    """For kernels on a GPU: captured in a CUDA graph, so that no side pays for its launches, and timed by events
    around each replay, before which the L2 cache is overwritten."""

    WARM_UPS = 3
    turn, before_turn = 0.005, 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushing = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self._pool: Any = None

    @contextlib.contextmanager
    def running(self) -> Any:
        # Backward passes run on the stream of their forward passes: one stream for all, which captures as well.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Graphs of one comparison are replayed one after the other, in the same memory.
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
            self._flushing.zero_()
            start.record()
            side()
            end.record()
        torch.cuda.synchronize(self._device)
        return fmean(start.elapsed_time(end) for start, end in events) / 1e3
