"""Labelled images of a split, in memory or in files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from . import augment
from .decode import check_header
from .formats import InputFormat
from .items import ItemImages
from .plan import Plan

_CHECKED_AT_ONCE = 500  # files that a thread checks in a turn
_PREFETCH = 2  # batches of files that are decoded ahead of the one in use


@dataclass(frozen=True)
class MemoryImages:
    """Labelled images in memory, augmented by a padded random crop and a flip.

    Attributes:
        images: uint8 ``[N, H, W, C]``; for data that are not images, float32 measurements ``[N, 1, 1, C]``.
        labels: class indices, int64 ``[N]``; for a regression, targets, float32 ``[N]``.
        pad: pixels of padding for the random crop.
        flip: whether mirroring keeps the class of an image.
    """

    images: Tensor
    labels: Tensor
    pad: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers that augment ``count`` images: float64 ``[count, k]`` in [0, 1)."""
        return _uniform(count, augment.CROP_AND_FLIP_DRAWS, generator)

    def pixels(self, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return images as uint8 ``[B, H, W, C]``, augmented if ``noise`` (rows of :meth:`draw`) is given."""
        images = self.images[indices.to(self.images.device)]
        if noise is None:
            return images
        return augment.crop_and_flip(images, noise, pad=self.pad, flip=self.flip)

    def batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels of every batch of a plan."""
        for indices, noise in plan:  # making a batch costs less than handing it between threads
            yield self.pixels(indices, noise), self.labels[indices.to(self.labels.device)]

    def check(self) -> None:
        """Check nothing: these images are decoded already. See :meth:`FileImages.check`."""

    def subset(self, indices: Tensor) -> MemoryImages:
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def indexed(self) -> MemoryImages:
        """Return the same images, each with its index as label."""
        return replace(self, labels=torch.arange(len(self), device=self.labels.device))

    def to(self, device: torch.device) -> MemoryImages:
        """Move the images to ``device``; batches are then selected and augmented there."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class FileImages:
    """Labelled image files, decoded by threads on demand, augmented by a random resized crop and a flip.

    Attributes:
        paths: N files.
        labels: int64 ``[N]``.
        input: the format to decode to.
        workers: number of decoding threads.
    """

    paths: tuple[str, ...]
    labels: Tensor
    input: InputFormat
    workers: int = 8
    _pool: ThreadPoolExecutor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pool", ThreadPoolExecutor(self.workers))

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """See :meth:`MemoryImages.draw`."""
        return _uniform(count, augment.RESIZED_CROP_DRAWS, generator)

    def pixels(self, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """See :meth:`MemoryImages.pixels`.

        Raises:
            DataError: a file is not a complete image.
        """
        paths = [self.paths[index] for index in indices.tolist()]
        rows = [None] * len(paths) if noise is None else noise.tolist()
        return torch.from_numpy(np.stack(list(self._pool.map(self.input.read, paths, rows))))

    def batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`MemoryImages.batches`. Another thread prepares the pixels of two batches in advance.

        The calling thread consumes the plan itself, completely and in order: the state of a generator that it draws
        from does not depend on timing.
        """
        waiting: deque[tuple[Tensor, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(1) as thread:
            try:
                for indices, noise in plan:
                    waiting.append((self.labels[indices], thread.submit(self.pixels, indices, noise)))
                    if len(waiting) > _PREFETCH:
                        labels, pixels = waiting.popleft()
                        yield pixels.result(), labels
                for labels, pixels in waiting:
                    yield pixels.result(), labels
            finally:
                thread.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Check without decoding that all files can be read and begin like images.

        Raises:
            DataError: some are not; the text names the first.
        """
        chunks = [self.paths[start : start + _CHECKED_AT_ONCE] for start in range(0, len(self), _CHECKED_AT_ONCE)]
        problems = [problem for chunk in self._pool.map(_problems, chunks) for problem in chunk]
        if problems:
            others = f" ({len(problems) - 1} more cannot be read)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{others}")

    def subset(self, indices: Tensor) -> FileImages:
        paths = tuple(self.paths[index] for index in indices.tolist())
        return replace(self, paths=paths, labels=self.labels[indices])

    def indexed(self) -> FileImages:
        """See :meth:`MemoryImages.indexed`."""
        return replace(self, labels=torch.arange(len(self)))

    def to(self, device: torch.device) -> FileImages:
        """Return the same images: files stay where they are."""
        return self


Images = MemoryImages | FileImages | ItemImages


def _problems(paths: Sequence[str]) -> list[str]:
    problems = []
    for path in paths:
        try:
            check_header(path)
        except DataError as error:
            problems.append(str(error))
    return problems


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)
