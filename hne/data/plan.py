"""Which images make up each batch, and the random numbers that change them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

Plan = Iterator[tuple[Tensor, Tensor | None]]
"""For each batch the indices of its images ``[B]``, and rows of the split's ``draw()`` ``[B, ...]``; None for images as
they are."""


class Split(Protocol):
    """Labelled images, for evaluation."""

    def __len__(self) -> int:
        """The number of images."""

    def batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels ``[B, H, W, C]`` and labels ``[B]`` of every batch of a plan."""
