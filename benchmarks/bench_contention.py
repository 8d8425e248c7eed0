"""Calls on a busy machine: others spin on the cores that the threads of a call would have.

Each side has a process of its own, in which its calls are back to back.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from derived import BUSY_CORE, BUSY_THREADS
from processes import ProcessCase

from hne.inference import missing

_NEIGHBOUR = "onnxruntime"  # by default its threads spin for 30 ms after a call
_SPIN = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
print(flush=True)
while True:
    pass
"""


@contextmanager
def _spinning_process() -> Iterator[None]:
    """A process that uses one core the whole time; where the system allows that, always the same one."""
    with subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield
        finally:
            process.kill()


def bench_busy_core(contention: ProcessCase, in_processes: Callable[..., None]) -> None:
    """Another process spins on one of the cores."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("there is one core only")
    with _spinning_process():
        in_processes(BUSY_CORE, contention)


def bench_busy_threads(contention: ProcessCase, in_processes: Callable[..., None]) -> None:
    """An engine makes a call of the same network before each call, in the same process, and its threads still spin."""
    if (reason := missing(_NEIGHBOUR)) is not None:
        pytest.skip(reason)
    in_processes(BUSY_THREADS, contention, neighbour=_NEIGHBOUR)
