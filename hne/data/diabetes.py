"""scikit-learn's diabetes data: a regression without a download."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset
from .formats import InputFormat, TargetFormat
from .images import MemoryImages


def diabetes(data_dir: str | Path | None = None) -> Dataset:
    """Progression of diabetes in 442 patients after one year, from 10 measurements each (Efron et al. 2004).

    The data come with scikit-learn; ``data_dir`` is ignored. A patient is an image of one pixel with one channel per
    measurement. Every third patient is a test sample.
    """
    from sklearn.datasets import load_diabetes  # importing it takes a second

    bunch = load_diabetes(scaled=False)
    features = torch.from_numpy(bunch.data).float()[:, None, None]
    target = torch.from_numpy(bunch.target).float()
    test = torch.arange(len(target)) % 3 == 2
    std, mean = torch.std_mean(features[~test].flatten(0, 2), 0, correction=0)
    target_std, target_mean = torch.std_mean(target[~test], correction=0)
    return Dataset(
        "diabetes",
        (),
        InputFormat(len(mean), (1, 1), tuple(mean.tolist()), tuple(std.tolist())),
        MemoryImages(features[~test], target[~test]),
        MemoryImages(features[test], target[test]),
        TargetFormat(target_mean.item(), target_std.item()),
    )
