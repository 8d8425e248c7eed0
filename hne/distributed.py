"""One process or several: rank, device and the collective operations that training and evaluation need."""

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

_GLOO_RELEASE_SECONDS = 0.2


@dataclass(frozen=True)
class World:
    """This process and the group of processes that compute together.

    Attributes:
        device: Device of this process.
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share_buffers(self, module: nn.Module) -> None:
        """Copy the buffers (running statistics) of the first process to all others."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def parallel(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over the processes; ``module`` itself in a single process."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def is_main_process() -> bool:
    """Whether this is the only process or the first of those started by torchrun; works before they have joined."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(name: str = "auto") -> torch.device:
    """The device for this process.

    Args:
        name: ``cpu``, ``cuda``, or ``auto`` for a GPU if there is one and the CPU otherwise.

    Raises:
        TrainingError: ``name`` is ``cuda`` and there is no GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError(f"device {name}: torch {torch.__version__} sees no GPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes started by torchrun (gloo on CPUs, nccl on GPUs); without torchrun, a world of one."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        # A thread of gloo may still have to release a tensor, which takes the GIL. Destroying the group holds the GIL
        # while it waits for that thread: a deadlock. Sleeping releases the GIL first.
        time.sleep(_GLOO_RELEASE_SECONDS)
        dist.destroy_process_group()
