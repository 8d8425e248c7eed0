"""Folders of corrupted images in the format of CIFAR-10-C and CIFAR-100-C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ..images import MemoryImages
from .corrupt import SEVERITIES

_LABELS = "labels"


def read_corruptions(folder: Path) -> Iterator[tuple[str, int, MemoryImages]]:
    """Read the images of each corruption and severity, by the names of the files.

    The folder has ``labels.npy`` (whole numbers ``[5 * K]``) and for each corruption ``NAME.npy`` (uint8
    ``[5 * K, H, W, C]``): K images at severity 1, the same at severity 2, and so on. The arrays are mapped into memory;
    the pixels are read when batches are made.

    Raises:
        DataError: the folder or a file is missing, or a file has other content.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = {path.stem: path for path in sorted(folder.glob("*.npy")) if not path.name.startswith(".")}
    if _LABELS not in files or len(files) < 2:
        raise DataError(f"{folder}: expected {_LABELS}.npy and a file NAME.npy for each corruption, as in CIFAR-10-C")
    path = files.pop(_LABELS)
    labels = _array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or len(labels) % len(SEVERITIES):
        raise DataError(
            f"{path}: expected whole numbers for {len(SEVERITIES)} severities, got {labels.dtype} {list(labels.shape)}"
        )
    count = len(labels) // len(SEVERITIES)
    classes = torch.from_numpy(labels.astype(np.int64))
    for name, path in files.items():
        images = _array(path)
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) != len(labels):
            raise DataError(
                f"{path}: expected uint8 [{len(labels)}, height, width, channels], "
                f"got {images.dtype} {list(images.shape)}"
            )
        for severity in SEVERITIES:
            part = slice((severity - 1) * count, severity * count)
            yield name, severity, MemoryImages(torch.from_numpy(images[part]), classes[part])


def _array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="c")  # torch warns of arrays that it cannot write to
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not an array of NumPy ({error})") from error
