"""scikit-learn's diabetes data: a regression without a download."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset, InputFormat, MemoryImages, TargetFormat


def diabetes(data_dir: str | Path | None = None) -> Dataset:
    """442 patients, 10 measurements each, and how far the disease has come a year later (Efron et al. 2004); all from
    scikit-learn: ``data_dir`` is not used.

    A patient is an image of one pixel with a channel for each measurement. Every third one is for testing.
    """
    from sklearn.datasets import load_diabetes  # takes a second: only for who wants it

    bunch = load_diabetes(scaled=False)
    features = torch.from_numpy(bunch.data).float()[:, None, None]
    target = torch.from_numpy(bunch.target).float()
    test = torch.arange(len(target)) % 3 == 2
    std, mean = torch.std_mean(features[~test].flatten(0, 2), 0, correction=0)
    target_std, target_mean = torch.std_mean(target[~test], correction=0)
    return Dataset(
        "diabetes",
        (),
        # An input format takes numbers to lie between 0 and 255.
        InputFormat(len(mean), (1, 1), tuple((mean / 255).tolist()), tuple((std / 255).tolist())),
        MemoryImages(features[~test], target[~test]),
        MemoryImages(features[test], target[test]),
        TargetFormat(target_mean.item(), target_std.item()),
    )
