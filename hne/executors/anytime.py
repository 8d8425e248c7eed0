"""Anytime inference: an answer after every model of the ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hierarchy import Hierarchy
from .base import MemberRunner


class AnytimeExecutor(Protocol):
    """What :class:`Anytime` needs of a :class:`SubtreeExecutor`."""

    def member_runner(self, network: Any) -> MemberRunner: ...
    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor: ...


class AnytimeNetwork(Protocol):
    hierarchy: Hierarchy

    def executor(self) -> AnytimeExecutor: ...


class Anytime(Iterator[tuple[int, Tensor]]):
    """Evaluates the tree leaf by leaf, depth first, as the paper describes; see :meth:`HNE.anytime`.

    The iterator keeps the output of each node on the path to the current leaf, because the next leaf branches off from
    one of them. A node is computed once, in the step that first needs it. The parameters must not change before the
    last step: they are checked for changes only at the beginning.

    Attributes:
        num_models: Leaves evaluated so far.
    """

    def __init__(self, network: AnytimeNetwork, x: Tensor) -> None:
        self.num_models = 0
        self._logits: Tensor | None = None  # of the latest leaf, [1, batch, num_classes]
        self._network = network
        self._executor = network.executor()
        self._run = self._executor.member_runner(network)
        self._images = x
        self._path: list[Tensor] = []  # _path[b] is the output of block b
        self._total: Tensor | None = None

    @property
    def member(self) -> Tensor | None:
        """Logits ``[batch, num_classes]`` of the latest leaf alone; None before the first step."""
        return None if self._logits is None else self._logits[0]

    def __next__(self) -> tuple[int, Tensor]:
        tree, leaf = self._network.hierarchy, self.num_models
        if leaf == tree.num_models:
            raise StopIteration
        executor = self._network.executor()
        if executor is not self._executor:  # gradients were switched on or off
            self._executor, self._run = executor, executor.member_runner(self._network)
        first = tree.first_new(leaf)
        del self._path[first:]
        x = self._path[-1] if first > 0 else self._images
        features, self._logits, self._total, mean = self._run(x, leaf, first, self._total)
        self._path += features
        self.num_models += 1
        return self.num_models, mean

    def select(self, samples: Tensor) -> None:
        """Continue with some samples of the batch. Later answers contain these samples, in the given order.

        Args:
            samples: Indices of the samples in the current batch, ``[K]`` int64, 0 to B - 1; or a mask ``[B]`` (bool).

        Raises:
            RuntimeError: There is no answer yet.
            TypeError: ``samples`` are neither integers nor bool.
            ValueError: ``samples`` has another shape, or an index is out of range. Nothing has changed then.
        """
        if self._logits is None or self._total is None:
            raise RuntimeError("select() chooses by an answer: ask for the first one before")
        samples = _indices(samples, self._total)
        logits, total, images = self._logits[:, samples], self._total[samples], self._images[samples]
        path = [self._executor.select_samples(x, samples) for x in self._path]
        self._logits, self._total, self._images, self._path = logits, total, images, path


def _indices(samples: Tensor, member: Tensor) -> Tensor:
    """Checked indices ``[K]`` int64 into the batch of ``member`` ``[B, L]``, on its device."""
    batch = len(member)
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples: expected a tensor of indices or a mask, got {type(samples).__name__}")
    if samples.dtype == torch.bool:
        if samples.shape != (batch,):
            raise ValueError(f"samples: expected a mask of shape ({batch},), got {tuple(samples.shape)}")
        return samples.to(member.device).nonzero()[:, 0]
    if samples.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):  # torch takes uint8 for a mask
        raise TypeError(f"samples: expected int64 indices or a mask of bool, got {samples.dtype}")
    if samples.dim() != 1:
        raise ValueError(f"samples: expected indices of shape (K,), got {tuple(samples.shape)}")
    samples = samples.to(member.device, torch.int64)
    if len(samples):
        low, high = (int(bound) for bound in samples.aminmax())
        if low < 0 or high >= batch:
            raise ValueError(f"samples: expected indices from 0 to {batch - 1}, got {low if low < 0 else high}")
    return samples
