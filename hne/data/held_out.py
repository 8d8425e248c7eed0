"""Images that are held out from the training images, to choose options without the test images."""

from __future__ import annotations

from dataclasses import replace

import torch

from .dataset import Dataset
from .items import ItemImages


def hold_out_images(dataset: Dataset, share: float, seed: int = 0) -> Dataset:
    """Test on a share of the training images in place of the test images.

    Args:
        dataset: The data set.
        share: Share of the training images of each class that is held out, above 0 and below 1; of a regression, share
            of all samples. At least one image of a class is held out, and at least one is left.
        seed: Chooses the images.

    Returns:
        The data set with other splits; the normalisation stays that of all training images.

    Raises:
        ValueError: The share is out of range, a class has a single training image, or the images come from a data set
            of PyTorch, whose labels are not known.
    """
    if not 0 < share < 1:
        raise ValueError(f"val_share: expected a number above 0 and below 1, got {share}")
    train = dataset.train
    if isinstance(train, ItemImages):
        raise ValueError(f"val_share: the labels of {dataset.name} are not known before training; split it yourself")
    groups = torch.zeros(len(train), dtype=torch.int64) if dataset.target is not None else train.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    for group in groups.unique().tolist():
        members = (groups == group).nonzero()[:, 0]
        if len(members) < 2:
            raise ValueError(f"val_share: expected at least 2 training images of each class, class {group} has one")
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    kept, tested = ((held_out == flag).nonzero()[:, 0] for flag in (False, True))
    return replace(dataset, train=train.subset(kept), test=train.subset(tested), held_out=(share, seed))
