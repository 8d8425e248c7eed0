"""Memory of large CPU tensors."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def retain_memory() -> bool:
    """Let the process keep memory that it has freed, for the next tensor of its size.

    PyTorch takes CPU memory from malloc, and glibc's malloc asks the system for every block above 32 MiB (or less)
    and gives it back when it is freed. Each use of such a tensor then begins with a page fault per 4 KiB, which can
    take as long as the computation. It is a setting of the whole process, so a program asks for it, a library does
    not; call it before large tensors are made. ``hne`` on the command line and the benchmarks do.

    Returns:
        Whether it took effect: False where malloc is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # No block outside the heap, a heap that does not shrink, and that grows by 64 MiB at least.
    return all(mallopt(*setting) == 1 for setting in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)))
