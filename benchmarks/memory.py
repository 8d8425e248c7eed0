"""Peak memory of a training step, measured in a fresh process so that every allocator counts."""

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
    """Call ``function`` in a fresh process and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def peak_mib(call: Callable[[], Any]) -> float:
    """Peak memory of a second call in MiB, beyond the memory of the process after the first call (Linux only).

    Resident pages count: those of the allocator and of each engine's scratch memory. The first call compiles and fills
    caches; the memory that it frees is returned to the system before the second call.
    """
    call()
    gc.collect()
    give_back()
    _RESET.write_text("5")  # resets the peak
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def give_back() -> None:
    """Return freed memory to the system: idle buffers of this package's ops, and the heap of glibc."""
    K.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(entry: str) -> int:
    """Read an entry of the process status, in KiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1])
