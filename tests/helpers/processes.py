"""Several processes that compute together."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path

from torch import multiprocessing


def run_processes(function: Callable[[int, str], None], folder: Path, count: int = 2) -> None:
    """Call ``function(rank, folder)`` in ``count`` new processes, and wait for them.

    They are copies of one that has imported PyTorch and this package, which takes longer than most functions, and that
    has computed nothing: a copy of the process of the tests would lack the threads of autograd and OpenMP.
    """
    set_forkserver_preload(["torch.distributed.fsdp", "hne.training"])
    multiprocessing.start_processes(function, (str(folder),), nprocs=count, start_method="forkserver")
