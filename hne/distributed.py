"""One process or several: rank, device and the few collective operations that training needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import TrainingError

_PATIENCE = 0.2  # seconds


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        device: where it computes.
        rank, size: its number, and how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the buffers (running statistics) of the first."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def parallel(self, module: nn.Module) -> nn.Module:
        """``module`` with its gradients averaged over the processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(name: str = "auto") -> torch.device:
    """The device that ``auto`` (a GPU if there is one), ``cpu`` or ``cuda`` means for this process.

    Raises:
        TrainingError: ``cuda`` was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(f"device {name}: torch {torch.__version__} sees no GPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun has started (gloo on the CPU, nccl on GPUs), or be the
    only one.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        # A thread of gloo may still have to give back a tensor, for which it needs Python's lock, which the end of the
        # group would keep for ever: both wait. Sleeping lets go of the lock.
        time.sleep(_PATIENCE)
        dist.destroy_process_group()
