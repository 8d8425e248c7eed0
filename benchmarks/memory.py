"""How much memory a training step takes: measured in a process of its own, whatever allocates it."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import hne_kernels as K

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    """The result of ``function`` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that a second call takes at its peak, beyond what the process has after the first one (Linux).

    Pages that are resident count: those of the allocator and of each engine's scratch memory. The first call compiles
    and fills caches; what it has freed is given back to the system before the second one.
    """
    call()
    gc.collect()
    give_back()
    _RESET.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def give_back() -> None:
    """Return freed memory to the system: what our ops keep, and the C library, where it can be told to."""
    K.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(entry: str) -> int:
    """KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1])
