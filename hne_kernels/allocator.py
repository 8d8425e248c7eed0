"""The memory that the CPU ops keep."""

from __future__ import annotations

from . import extension


def release_memory() -> int:
    """Give the memory that no tensor uses back to the system.

    What the CPU ops write (64 KiB and more) comes from memory of earlier tensors that are gone: fresh memory costs a
    page fault for every 4 KiB. In use or not, it is little more than was in use at one time (64 MiB, and at most a
    quarter); this is for a program that has passed its peak.

    Returns:
        How many bytes it was.
    """
    released: int = extension.cpu_library().release_memory()
    return released
