"""Anytime inference: an answer after every model of the ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hierarchy import Hierarchy
from .base import SubtreeRunner


class AnytimeExecutor(Protocol):
    """What :class:`Anytime` needs of a :class:`SubtreeExecutor`."""

    def runner(self, network: Any) -> SubtreeRunner: ...
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
        member: Logits ``[batch, num_classes]`` of the latest leaf alone; None before the first step.
    """

    def __init__(self, network: AnytimeNetwork, x: Tensor) -> None:
        self.num_models = 0
        self.member: Tensor | None = None
        self._network = network
        self._executor = network.executor()
        self._run = self._executor.runner(network)
        self._images = x
        self._path: list[Tensor] = []  # _path[b] is the output of block b
        self._total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)

    def __next__(self) -> tuple[int, Tensor]:
        tree, leaf = self._network.hierarchy, self.num_models
        if leaf == tree.num_models:
            raise StopIteration
        executor = self._network.executor()
        if executor is not self._executor:  # gradients were switched on or off
            self._executor, self._run = executor, executor.runner(self._network)
        first = tree.first_new(leaf)
        del self._path[first:]
        x = self._path[-1] if first > 0 else self._images
        *features, logits = self._run(x, slice(leaf, leaf + 1), first, keep=True)
        self._path += features
        self.member = logits[0]
        self._total = self._total + self.member
        self.num_models += 1
        mean = self._total / self.num_models
        return self.num_models, mean if mean.dtype == logits.dtype else mean.to(logits.dtype)

    def select(self, samples: Tensor) -> None:
        """Continue with some samples of the batch. Later answers contain these samples, in the given order.

        Args:
            samples: Indices of the samples in the current batch, ``[K]`` int64, 0 to B - 1; or a mask ``[B]`` (bool).

        Raises:
            RuntimeError: There is no answer yet.
            TypeError: ``samples`` are neither integers nor bool.
            ValueError: ``samples`` has another shape, or an index is out of range. Nothing has changed then.
        """
        if self.member is None:
            raise RuntimeError("select() chooses by an answer: ask for the first one before")
        samples = _indices(samples, self.member)
        member, total, images = self.member[samples], self._total[samples], self._images[samples]
        path = [self._executor.select_samples(x, samples) for x in self._path]
        self.member, self._total, self._images, self._path = member, total, images, path


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
