"""Comparison of sides that each have a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from comparison import Row, Watch, check_agreement
from meters import percentile
from worker import FUSED, Files, Worker
from workload import Network, Workload

from hne.inference import ENGINES, missing

ProcessCase = tuple[Network, int, int]  # ensemble size, batch


def compare_processes(
    name: str,
    case: ProcessCase,
    files: Callable[[Network, int], Files],
    workload: Workload,
    watch: Watch,
    benchmark: Any,
    config: pytest.Config,
    neighbour: str | None = None,
) -> list[Row]:
    """Median and 99th percentile of all calls of each side, as a row with this name; none without measurement.

    The sides take turns of a second or two, in which the processes of the others sleep. ``neighbour`` is an engine that
    makes calls in the same processes; see :class:`worker.Worker`.
    """
    network, n, batch = case
    names = [FUSED, *(name for name in ENGINES if missing(name) is None)]
    without = config.getoption("--benchmark-without")
    turn, rounds = (0.05, 1) if config.getoption("--benchmark-quick") else (workload.turn, workload.turns)
    with ExitStack() as stack:
        written = files(network, n)
        workers = {
            name: stack.enter_context(Worker(name, written, batch, neighbour=neighbour))
            for name in names
            if name not in without
        }
        expected = workers[FUSED].result()
        for worker in workers.values():
            check_agreement(worker.result(), expected)
        seconds: dict[str, list[float]] = {name: [] for name in workers}

        def first_turn() -> None:
            seconds[FUSED] += (calls := workers[FUSED].calls(turn))
            watch.now += percentile(calls, 50)

        def other_turns() -> None:
            for name, worker in workers.items():
                if name != FUSED:
                    seconds[name] += worker.calls(turn)

        benchmark.pedantic(first_turn, teardown=other_turns, rounds=rounds)
    if benchmark.disabled:
        return []
    median, slow = ({name: percentile(s, q) * 1e3 for name, s in seconds.items()} for q in (50, 99))
    fused_ms = median.pop(FUSED)
    row = Row(
        name=name,
        shape=f"{network.name}, n = {n}, batch {batch}",
        fused_ms=fused_ms,
        naive_ms=float("nan"),
        images_per_s=batch / fused_ms * 1e3,
        rounds=rounds,
        others_ms=median,
        p99_ms=slow,
        case={
            "network": network.name,
            "num_models": n,
            "batch": batch,
            "dtype": str(torch.float32).removeprefix("torch."),
        },
    )
    benchmark.extra_info |= row.record()
    return [row]
