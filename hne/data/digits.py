"""scikit-learn's handwritten digits: a data set without a download, for a quick start and tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .dataset import Dataset
from .formats import InputFormat
from .images import MemoryImages


def digits(data_dir: str | Path | None = None) -> Dataset:
    """1797 handwritten digits, 8x8 grey, 10 classes, from scikit-learn; ``data_dir`` is ignored.

    Every second image of each class is a test image. The digits are easy: differences between ensembles show only with
    few training images and many test images.
    """
    from sklearn.datasets import load_digits  # importing it takes a second

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[..., None]
    labels = torch.from_numpy(bunch.target).long()
    rank = torch.zeros_like(labels)  # position of every image within its class
    for label in range(10):
        mask = labels == label
        rank[mask] = torch.arange(int(mask.sum()))
    test = rank % 2 == 1
    return Dataset(
        "digits",
        tuple("0123456789"),
        InputFormat(1, (8, 8), mean=(0.3049,), std=(0.3759,)),
        MemoryImages(images[~test], labels[~test], pad=1),
        MemoryImages(images[test], labels[test]),
    )
