"""A small network with its loss and optimiser, for training steps by CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import networks
import torch
from networks import NUM_CLASSES, build, images
from torch import Tensor, nn

from hne import FusedHNE
from hne.losses import objective
from hne.training import CapturedStep, training_step
from hne.training.captured_step import _ORDINARY_STEPS

OPTIMISER = {"momentum": 0.9, "weight_decay": 1e-3, "fused": True}


class Task:
    """A network, its loss and an optimiser, with momentum and weight decay."""

    def __init__(self, rng: torch.Generator, *, dropout: float = 0.0, **options: Any) -> None:
        network = build(FusedHNE, networks.TREES["odd"], rng, torch.float32).train()
        self.model: Any = nn.Sequential(nn.Dropout(dropout), network) if dropout else network
        self.optimizer = torch.optim.SGD(self.model.parameters(), **{**OPTIMISER, "lr": torch.tensor(0.05), **options})

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        return objective("I+HD")(self.model(x), target)

    def captured(self, **options: Any) -> CapturedStep:
        return CapturedStep(self.model, self.loss, self.optimizer, **options)

    def step(self, *batch: Tensor) -> Tensor:
        return training_step(self.loss, self.optimizer, *batch)

    def copy(self) -> Task:
        return copy.deepcopy(self)

    def state(self) -> dict[str, Tensor]:
        buffers = {f"momentum {i}": s["momentum_buffer"] for i, s in enumerate(self.optimizer.state.values())}
        return {**self.model.state_dict(), **buffers}


def batch(rng: torch.Generator, size: int = 4) -> tuple[Tensor, Tensor]:
    return images(rng, size, dtype=torch.float32), torch.randint(NUM_CLASSES, (size,), generator=rng)


def assert_equal(one: Task, other: Task) -> None:
    a, b = one.state(), other.state()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def warm_up(step: CapturedStep, work: tuple[Tensor, Tensor]) -> None:
    """Ordinary steps, the capture and a replay."""
    for _ in range(_ORDINARY_STEPS + 2):
        step(*work)
