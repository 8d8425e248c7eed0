"""Batches of a split: the order of its images, and the share of this process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import DataError
from .formats import InputFormat
from .images import Images
from .plan import Plan, Split

Batch = tuple[Tensor, Tensor]  # inputs [B, C, H, W], labels [B]


def training_batches(
    split: Images,
    input_format: InputFormat,
    batch_size: int,
    generator: torch.Generator,
    *,
    augment: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """One epoch in a random order; an incomplete last batch is left out.

    Every process draws the same permutation and the same random numbers for the *global* batch and takes an equal
    share of it: together the processes see the same images as a single process.

    Args:
        split: images to train on.
        input_format: their normalisation.
        batch_size: global batch size, a multiple of ``world_size`` and at most ``len(split)``.
        generator: source of all randomness; to resume after an epoch, its state is enough.
        augment: whether images are augmented.
        rank, world_size: of this process.
        device: where the batches go.

    Yields:
        Inputs ``[batch_size / world_size, C, H, W]`` (see :meth:`InputFormat.normalise`) and their labels, int64
        ``[batch_size / world_size]``.

    Raises:
        DataError: all images are of one class.
        ValueError: ``batch_size`` is out of range or not a multiple of ``world_size``.
    """
    if not 1 <= batch_size <= len(split):
        raise ValueError(f"batch_size must lie between 1 and the {len(split)} images, got {batch_size}")
    if batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {batch_size}")
    _check_classes(split.labels)
    share = batch_size // world_size
    local = slice(rank * share, (rank + 1) * share)

    def plan() -> Plan:
        order = torch.randperm(len(split), generator=generator)
        for start in range(0, len(split) - batch_size + 1, batch_size):
            noise = split.draw(batch_size, generator)[local] if augment else None
            yield order[start : start + batch_size][local], noise

    return _load(split, input_format, plan(), device)


def evaluation_batches(
    split: Split,
    input_format: InputFormat,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Every image once, in order and not augmented; with several processes, every ``world_size``-th batch."""
    indices = torch.arange(len(split)).split(batch_size)[rank::world_size]
    return _load(split, input_format, ((batch, None) for batch in indices), device)


def _check_classes(labels: Tensor | None) -> None:
    """Check that there are at least two classes, where the labels are known and not those of a regression."""
    if labels is None or len(labels) < 2 or labels.is_floating_point() or labels.min() < labels.max():
        return
    raise DataError(
        f"expected training images of at least two classes, got {len(labels)} images of class {int(labels[0])}"
    )


def _load(split: Split, input_format: InputFormat, plan: Plan, device: torch.device | str) -> Iterator[Batch]:
    for pixels, labels in split.batches(plan):
        yield input_format.normalise(pixels.to(device)), labels.to(device)
