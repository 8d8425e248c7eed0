"""Which images make up each batch, and the random numbers that change them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

Plan = Iterator[tuple[Tensor, Tensor | None]]
"""For each batch the indices of its images ``[B]``, and rows of the split's ``draw()`` ``[B, ...]``; None for images as
they are."""
