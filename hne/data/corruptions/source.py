"""Corrupted test images by the name of their source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from ..dataset import Dataset
from ..images import MemoryImages
from ..plan import Split
from ..registry import limit_images
from .corrupt import CORRUPTIONS, SEVERITIES
from .files import read_corruptions
from .images import CorruptedImages

ALL = "all"


class Corruption(NamedTuple):
    """Test images with a corruption of a severity."""

    name: str
    severity: int
    images: Split


def corrupted_images(
    source: str | Path,
    dataset: Dataset,
    *,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    limit: int | None = None,
) -> tuple[Corruption, ...]:
    """Corrupted test images for a data set.

    Args:
        source: ``all``; or names of :data:`CORRUPTIONS` with commas between them, which are applied to the test images
            of ``dataset``; or a folder in the format of CIFAR-10-C, whose images are taken instead.
        dataset: provides the test images and their format.
        severities: of 1 to 5.
        seed: of the noise.
        limit: of the files of a folder, use only this many images of each severity, those that
            :func:`hne.data.load_dataset` selects by ``limit_test``.

    Raises:
        ValueError: a severity or the seed is out of range.
        DataError: ``source`` is neither names nor a folder, its images do not fit ``dataset``, or ``dataset`` has no
            images or classes.
    """
    unknown = [severity for severity in severities if severity not in SEVERITIES]
    if unknown or not severities:
        raise ValueError(f"severities: expected some of 1, 2, 3, 4, 5, got {list(severities)}")
    if dataset.target is not None:
        raise DataError(f"corruptions: expected images with classes; {dataset.name} has none")
    names = CORRUPTIONS if source == ALL else str(source).split(",")
    if all(name in CORRUPTIONS for name in names):
        return tuple(
            Corruption(name, severity, CorruptedImages(dataset.test, name, severity, seed))
            for name in dict.fromkeys(names)
            for severity in severities
        )
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; the corruptions by name are {', '.join(CORRUPTIONS)}, and all")
    return tuple(
        Corruption(name, severity, limit_images("limit", images, limit))
        for name, severity, images in _fitting(folder, dataset)
        if severity in severities
    )


def _fitting(folder: Path, dataset: Dataset) -> Iterator[tuple[str, int, MemoryImages]]:
    """The images of a folder, after a check that they have the shape and classes of ``dataset``."""
    expected = [*dataset.input.size, dataset.input.channels]
    for name, severity, images in read_corruptions(folder):
        shape = list(images.images.shape[1:])
        if shape != expected:
            raise DataError(f"{folder / name}.npy: expected images {expected}, as in {dataset.name}, got {shape}")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= len(dataset.classes):
            raise DataError(
                f"{folder}/labels.npy: expected the {len(dataset.classes)} classes of {dataset.name}, "
                f"got labels from {low} to {high}"
            )
        yield name, severity, images
