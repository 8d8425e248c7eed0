"""Tests of vast tensors take turns, so that parallel processes do not exceed the GPU's memory together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GIB = 1 << 30


def lock_file() -> Path:
    """The file that one process of this user at a time locks."""
    return Path(tempfile.gettempdir()) / f"hne-vast-tensors-{os.getuid()}.lock"


@contextlib.contextmanager
def vast_tensors(gib: int) -> Iterator[None]:
    """Decorator of a test that needs ``gib`` GiB of free GPU memory; it waits for such tests of other processes.

    The test is skipped if there is less free memory, or if other programs take it while the test runs. Any other lack
    of memory is an error.
    """
    with lock_file().open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        if free < gib * GIB:
            pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free // GIB}")
        try:
            yield
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info()
            left = free + torch.cuda.memory_reserved()
            traceback.clear_frames(error.__traceback__)
            if left >= gib * GIB:
                raise
            pytest.skip(f"needs {gib} GiB of GPU memory, other programs left {left // GIB} of {total // GIB} meanwhile")
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # pytest keeps the error, and its frames keep the tensors
            raise
        finally:
            torch.cuda.empty_cache()
