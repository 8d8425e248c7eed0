"""Memory of the CPU ops."""

from __future__ import annotations

from . import extension


def release_memory() -> int:
    """Return idle memory of the CPU ops to the system, for a program that has passed its peak.

    CPU outputs of 64 KiB and more reuse freed buffers, since new memory costs a page fault for every 4 KiB. The memory
    in use and in idle buffers is at most the peak in use plus 64 MiB, plus a quarter.

    Returns:
        The number of bytes.
    """
    released: int = extension.cpu_library().release_memory()
    return released
