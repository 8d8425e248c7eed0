"""Calls back to back, each side in a process of its own: no rest between calls, and no other threads in the process."""

from __future__ import annotations

from collections.abc import Callable

from derived import BACK_TO_BACK
from processes import ProcessCase


def bench_back_to_back(processes: ProcessCase, in_processes: Callable[..., None]) -> None:
    """Median and 99th percentile of all calls."""
    in_processes(BACK_TO_BACK, processes)
